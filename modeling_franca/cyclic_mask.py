"""CyclicMask: masks of patches that leave one block visible, equally likely at any position of the grid."""

import math

import numpy as np


class CyclicMask:
    """Draws masks that leave a block of patches visible, shifted cyclically over the edges of the grid.

    A block inside the grid would cover its middle more often than its corners; with the shift, every position is
    equally likely to be masked (Franca, section 3.2).

    Args:
        height: of the grid, in patches.
        width: of the grid, in patches.
        ratio: fraction of the patches that is masked; their number is exactly round(ratio * height * width).
        min_aspect: lower limit of the visible block's height / width and of its width / height.

    Raises:
        ValueError: a ratio outside [0, 1), an aspect outside (0, 1], a grid without patches.
    """

    def __init__(self, height: int, width: int, ratio: float, min_aspect: float = 0.5):
        if not 0 <= ratio < 1:
            raise ValueError(f"mask_ratio: {ratio} is not allowed; use a share from 0 to below 1")
        if not 0 < min_aspect <= 1:
            raise ValueError(f"min_aspect: {min_aspect} is not allowed; use a number above 0 up to 1")
        if min(height, width) < 1:
            raise ValueError(f"grid: {height}x{width} patches cannot be masked; use at least 1x1")
        self.height = height
        self.width = width
        self.count = round(ratio * height * width)
        self.min_aspect = min_aspect

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """A boolean (height, width) mask, True where a patch is masked."""
        left = self.height * self.width - self.count
        aspect = math.exp(rng.uniform(math.log(self.min_aspect), -math.log(self.min_aspect)))
        rows = max(math.ceil(math.sqrt(left * aspect)), math.ceil(left / self.width))
        rows = max(1, min(rows, self.height, left))
        columns = math.ceil(left / rows)
        mask = np.ones((self.height, self.width), dtype=bool)
        block = np.arange(rows * columns).reshape(rows, columns)
        mask[:rows, :columns] = block >= left  # the last row of the block may be shorter
        return np.roll(mask, (rng.integers(self.height), rng.integers(self.width)), axis=(0, 1))


__all__ = ["CyclicMask"]
