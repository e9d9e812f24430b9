"""Unit vectors and their first dimensions in small precisions, and scores of them."""

import numpy as np

from .stages import Stage

# Entries of a small precision that are converted to float32 at once: few enough to stay in a processor's cache.
_CACHED = 2**18
# For int8: this many standard deviations of a random unit vector's entries become 127. It is the format of
# `modeling_2dmse.formats.quantize`, which retrieval may not import; a test compares the two.
_DEVIATIONS = 4


def unit(rows, width: int | None, first: int, name: str) -> np.ndarray:
    """A copy of the rows, of unit norm in float32; ValueError that names a row without a direction."""
    with np.errstate(over="ignore"):  # a number that float32 does not have is reported below
        rows = np.array(rows, dtype=np.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        raise ValueError(f"{name}: a shape of {rows.shape} is not allowed; use (rows, {width or 'dimensions'})")
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(broken):
        what = "zero" if norms[broken[0], 0] == 0 else "not finite"
        raise ValueError(f"{name}: the vector in row {first + broken[0]} is {what}")
    rows /= norms
    return rows


def unit_queries(queries, width: int) -> np.ndarray:
    """Unit queries (Q, width) of an array (Q, width) or (width,); ValueError if there is none, or one is wrong."""
    rows = np.atleast_2d(np.asarray(queries))
    if not len(rows):
        raise ValueError("queries: there are none; give at least one")
    return unit(rows, width, 0, "queries")


def prefix(rows: np.ndarray, dim: int, precision: str) -> np.ndarray:
    """The first dimensions of unit vectors, normalised again, in a precision; 64 bits go into a number."""
    rows = rows[:, :dim]
    if precision == "binary":
        bits = np.packbits(rows > 0, axis=1)
        return np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    if precision == "int8":
        scale = 127 * dim**0.5 / _DEVIATIONS
        return np.clip(np.rint(rows * scale), -127, 127).astype(np.int8)
    return rows


def score(queries: np.ndarray, rows: np.ndarray, stage: Stage) -> np.ndarray:
    """(Q, rows): cosine similarity, or for bits the share of equal ones."""
    if stage.precision == "float32":
        return products(queries, rows)
    step = max(1, _CACHED // stage.dim)
    parts = [_score_small(queries, rows[start : start + step], stage) for start in range(0, len(rows), step)]
    return np.concatenate(parts, axis=1)


def _score_small(queries: np.ndarray, rows: np.ndarray, stage: Stage) -> np.ndarray:
    if stage.precision == "int8":
        return products(queries * (_DEVIATIONS / (127 * stage.dim**0.5)), rows.astype(np.float32))
    ones = np.ones(rows.shape[1], np.float32)  # a product with ones is the fastest sum of a few columns
    different = np.stack([np.bitwise_count(rows ^ query).astype(np.float32) @ ones for query in queries])
    return 1 - different / stage.dim


def products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q, rows): the dot products."""
    return queries @ rows.T if len(queries) > 1 else (rows @ queries[0])[None]
