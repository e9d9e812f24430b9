"""Nested sets of visual tokens: the counts that a square grid allows, and average pooling to one of them."""

import itertools
import math
from collections.abc import Sequence

import torch


def allowed_token_counts(side: int) -> list[int]:
    """The squares of the divisors of the grid's side, small to large.

    >>> allowed_token_counts(6)
    [1, 4, 9, 36]
    """
    return [divisor**2 for divisor in range(1, side + 1) if side % divisor == 0]


def nested_token_sizes(side: int) -> list[int]:
    """The default levels of a grid: its side is divided by its smallest prime factor down to 1.

    >>> nested_token_sizes(24)  # the paper's levels, for LLaVA-1.5's 24 x 24 grid
    [1, 9, 36, 144, 576]
    """
    sides = [side]
    while sides[0] > 1:
        sides.insert(0, sides[0] // next(f for f in range(2, sides[0] + 1) if sides[0] % f == 0))
    return [s**2 for s in sides]


def check_token_count(count: int, side: int, name: str = "num_visual_tokens") -> int:
    """The side of a level; ValueError that names the argument if `count` is not the square of a divisor of `side`."""
    allowed = allowed_token_counts(side)
    if isinstance(count, bool) or not isinstance(count, int) or count not in allowed:
        raise ValueError(
            f"{name}: {count!r} is not allowed; use the square of a divisor of the grid's side {side}: "
            f"{', '.join(map(str, allowed))}"
        )
    return math.isqrt(count)


def check_token_sizes(sizes: Sequence[int], side: int, name: str = "visual_token_sizes") -> list[int]:
    """The levels of a grid, small to large.

    Raises:
        ValueError: there are none, one appears twice or does not fit the grid, or is not a pooling of the next larger.
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise ValueError(f"{name}: {sizes!r} is not allowed; use a list of token counts, for example [1, 9, 36]")
    sides = {size: check_token_count(size, side, name) for size in sizes}
    if len(sides) < len(sizes):
        raise ValueError(f"{name}: {list(sizes)} names a level more than once")
    levels = sorted(sides)
    for small, large in itertools.pairwise(levels):
        if sides[large] % sides[small]:
            raise ValueError(
                f"{name}: {small} and {large} do not nest; {sides[small]} does not divide {sides[large]}, so "
                f"{small} tokens are not a pooling of {large}"
            )
    return levels


def pool_visual_tokens(states: torch.Tensor, num_visual_tokens: int) -> torch.Tensor:
    """Average-pool image features on their square grid (Cai et al. 2024, section 3).

    The mean is computed in float32 or a larger type. If all tokens are asked for, `states` is returned as it is.

    Args:
        states: (images, side * side, width), features row by row.
        num_visual_tokens: m * m, where m divides the side.

    Returns:
        (images, m * m, width): token (i, j) is the mean of the block of side / m by side / m features at row i and
        column j of the coarse grid.

    Raises:
        ValueError: the features do not form a square grid, or the count does not fit it.

    >>> pool_visual_tokens(torch.arange(16.0).view(1, 16, 1), 4).flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    images, length, width = states.shape
    side = math.isqrt(length)
    if side**2 != length:
        raise ValueError(
            f"vision_feature_select_strategy: {length} features per image do not form a square grid; use 'default' for "
            "a vision tower with a class token, 'full' for one without, and square images"
        )
    coarse = check_token_count(num_visual_tokens, side)
    if coarse == side:
        return states
    block = side // coarse
    blocks = states.to(torch.promote_types(states.dtype, torch.float32)).view(
        images, coarse, block, coarse, block, width
    )
    return blocks.mean(dim=(2, 4)).flatten(1, 2).to(states.dtype)
