"""Pooling is the mean of blocks, levels nest, and sizes that do not fit the grid are refused."""

import itertools

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from modeling_m3 import MatryoshkaLlavaConfig, pool_visual_tokens
from modeling_m3.visual_tokens import allowed_token_counts, check_token_sizes, nested_token_sizes


def block_means(states: torch.Tensor, count: int) -> torch.Tensor:
    """One sum per coarse token, in float64."""
    side, coarse = round(states.shape[1] ** 0.5), round(count**0.5)
    block = side // coarse
    result = torch.zeros(states.shape[0], count, states.shape[2], dtype=torch.float64)
    for row in range(coarse):
        for column in range(coarse):
            for i in range(row * block, (row + 1) * block):
                for j in range(column * block, (column + 1) * block):
                    result[:, row * coarse + column] += states[:, i * side + j].double() / block**2
    return result


@pytest.mark.parametrize(("side", "count"), [(6, 1), (6, 4), (6, 9), (6, 36), (24, 9), (24, 144), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_is_the_mean_of_blocks(side, count, dtype):
    states = torch.randn(2, side**2, 7, dtype=dtype)
    pooled = pool_visual_tokens(states, count)
    assert pooled.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(pooled.double(), block_means(states, count), atol=tolerance, rtol=0)


@pytest.mark.parametrize("side", [6, 8, 24])
def test_every_level_is_a_pooling_of_the_next(side):
    states = torch.randn(2, side**2, 5, dtype=torch.float64)
    levels = nested_token_sizes(side)
    assert len(levels) > 2
    for small, large in itertools.pairwise(levels):
        direct, through = (
            pool_visual_tokens(states, small),
            pool_visual_tokens(pool_visual_tokens(states, large), small),
        )
        torch.testing.assert_close(direct, through, atol=1e-14, rtol=0)
    torch.testing.assert_close(pool_visual_tokens(states, 1)[:, 0], states.mean(dim=1), atol=1e-14, rtol=0)
    assert pool_visual_tokens(states, side**2) is states


def test_means_of_half_precision_are_taken_in_float32():
    states = torch.full((1, 576, 1), 1.0, dtype=torch.bfloat16)
    states[0, 0] = 2.0  # in bfloat16 the sum would stop growing before 576
    assert pool_visual_tokens(states, 1).item() == torch.tensor(577 / 576, dtype=torch.bfloat16).item()
    assert pool_visual_tokens(states, 1).dtype == torch.bfloat16


def test_gradient_of_a_token_is_shared_by_its_block():
    states = torch.randn(1, 36, 2, requires_grad=True)
    pool_visual_tokens(states, 9)[0, 4].sum().backward()
    block = [2 * 6 + 2, 2 * 6 + 3, 3 * 6 + 2, 3 * 6 + 3]
    expected = torch.zeros(36, 2)
    expected[block] = 0.25
    assert torch.equal(states.grad[0], expected)


def test_levels_of_a_grid():
    assert allowed_token_counts(24) == [1, 4, 9, 16, 36, 64, 144, 576]
    assert nested_token_sizes(14) == [1, 49, 196]
    assert nested_token_sizes(27) == [1, 9, 81, 729]
    assert nested_token_sizes(1) == [1]
    assert check_token_sizes([36, 1, 9], 6) == [1, 9, 36]


WRONG_SIZES = {
    "no square": ([1, 12], r"visual_token_sizes: 12 is not allowed; use the square of a divisor of the grid's side 6"),
    "no divisor": ([16], r"visual_token_sizes: 16 is not allowed; .*: 1, 4, 9, 36"),
    "larger than the grid": ([36, 144], "visual_token_sizes: 144 is not allowed"),
    "zero": ([0, 36], "visual_token_sizes: 0 is not allowed"),
    "no whole number": ([1.0], r"visual_token_sizes: 1.0 is not allowed"),
    "a truth value": ([True], "visual_token_sizes: True is not allowed"),
    "twice": ([9, 9], r"visual_token_sizes: \[9, 9\] names a level more than once"),
    "not nested": ([4, 9], "visual_token_sizes: 4 and 9 do not nest; 2 does not divide 3"),
    "none": ([], r"visual_token_sizes: \[\] is not allowed; use a list of token counts"),
    "a word": ("36", "visual_token_sizes: '36' is not allowed"),
}


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_levels_that_do_not_fit_are_refused(name):
    sizes, message = WRONG_SIZES[name]
    with pytest.raises(ValueError, match=message):
        check_token_sizes(sizes, 6)


def test_features_without_a_square_grid_are_refused():
    with pytest.raises(ValueError, match="vision_feature_select_strategy: 37 features per image do not form a square"):
        pool_visual_tokens(torch.randn(1, 37, 4), 1)
    with pytest.raises(ValueError, match="num_visual_tokens: 5 is not allowed"):
        pool_visual_tokens(torch.randn(1, 36, 4), 5)


def config(side=6, **kwargs) -> MatryoshkaLlavaConfig:
    text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return MatryoshkaLlavaConfig(
        vision_config=CLIPVisionConfig(image_size=4 * side, patch_size=4), text_config=text, **kwargs
    )


def test_configuration_and_its_defaults():
    assert MatryoshkaLlavaConfig().visual_token_sizes == [1, 9, 36, 144, 576]
    assert MatryoshkaLlavaConfig().default_visual_tokens == 576
    plain = config()
    assert (plain.visual_token_sizes, plain.default_visual_tokens, plain.pool_position) == (
        [1, 9, 36],
        36,
        "after_projector",
    )
    assert plain.level_shares == {1: 1 / 3, 9: 1 / 3, 36: 1 / 3}
    weighted = config(visual_token_sizes=[36, 4], scale_loss_weights=[3, 1])
    assert weighted.level_shares == {4: 0.25, 36: 0.75}, "a weight stays with its level when they are sorted"


def test_configuration_survives_the_disk(tmp_path):
    config(
        visual_token_sizes=[36, 4],
        scale_loss_weights=[3, 1],
        pool_position="before_projector",
        default_visual_tokens=4,
    ).save_pretrained(tmp_path)
    again = MatryoshkaLlavaConfig.from_pretrained(tmp_path)
    assert again.level_shares == {4: 0.25, 36: 0.75}
    assert (again.pool_position, again.default_visual_tokens, again.grid_side) == ("before_projector", 4, 6)


WRONG = {
    "position": (
        {"pool_position": "inside"},
        "pool_position: 'inside' is unknown; choose one of after_projector, before",
    ),
    "default": ({"default_visual_tokens": 5}, "default_visual_tokens: 5 is not allowed"),
    "weights": ({"scale_loss_weights": [1, 2]}, "scale_loss_weights: there are 2 for 3 visual_token_sizes"),
    "a weight of zero": ({"scale_loss_weights": [1, 0, 1]}, r"scale_loss_weights: \[1, 0, 1\] is not allowed"),
    "an infinite weight": ({"scale_loss_weights": [1, float("inf"), 1]}, "scale_loss_weights"),
    "sizes": ({"visual_token_sizes": [7]}, "visual_token_sizes: 7 is not allowed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations_are_refused(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_a_grid_that_is_not_square_is_refused():
    tower = CLIPVisionConfig(patch_size=4)
    tower.image_size = (24, 48)
    with pytest.raises(ValueError, match=r"vision_config.image_size: \(24, 48\) is not allowed; .* square grid"):
        MatryoshkaLlavaConfig(vision_config=tower)
    tower.image_size = [24, 24]
    assert MatryoshkaLlavaConfig(vision_config=tower).grid_side == 6
