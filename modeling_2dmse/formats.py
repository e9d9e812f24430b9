"""Compact formats that unit vectors are stored in."""

import numpy as np
import torch

PRECISIONS = ("float32", "float16", "int8", "binary")


def check_precision(precision: str, similarity: str) -> None:
    """ValueError if `precision` is unknown, or embeddings that are compared in this way have no such format."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if similarity == "dot" and precision in ("int8", "binary"):
        raise ValueError(
            f"precision: {precision} needs unit vectors, but this model compares embeddings by dot product; use "
            "float32 or float16"
        )


def quantize(embeddings: torch.Tensor, precision: str) -> torch.Tensor:
    """Unit vectors in a compact format.

    `int8` and `binary` are the formats that `retrieval` stores the first dimensions of its vectors in. For `int8`, four
    standard deviations of a random unit vector's entries, 4 / sqrt(dim), become 127, and larger values are clipped.
    The scale is the same for all texts, so dot products of vectors from different calls can be compared. For `binary`,
    a bit is set where the value is above 0; eight bits go into a byte, the first dimension into the highest bit.

    Args:
        embeddings: (rows, dim), float32, unit norm.
        precision: `float32`, `float16`, `int8` or `binary`.

    Returns:
        (rows, dim), or (rows, ceil(dim / 8)) in uint8 for `binary`.

    Raises:
        ValueError: `precision` is unknown.

    >>> quantize(torch.tensor([[0.6, -0.8, 0.0, 0.0]]), "int8").tolist()
    [[38, -51, 0, 0]]
    >>> quantize(torch.tensor([[0.6, -0.8, 0.0, 0.0]]), "binary").tolist()
    [[128]]
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision == "float16":
        return embeddings.half()
    if precision == "int8":
        scale = 127 * embeddings.shape[-1] ** 0.5 / 4
        return (embeddings * scale).round().clamp(-127, 127).to(torch.int8)
    if precision == "binary":
        return torch.from_numpy(np.packbits((embeddings > 0).cpu().numpy(), axis=-1))
    return embeddings
