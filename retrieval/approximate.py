"""An approximate first stage with FAISS: a graph or inverted lists over the first dimensions."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# k-means needs some rows per centre; more than this many make it slower, not better.
_ROWS_PER_CENTRE = 64


def faiss():
    """The library; ValueError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError('approximate: FAISS is missing; pip install "twodmse[faiss]"') from error
    return faiss


def build_graph(spec: str, dim: int, blocks: Callable[[], Iterator[np.ndarray]], count: int, path: Path) -> None:
    """Build and write a FAISS index for inner products of unit vectors.

    Args:
        spec: for FAISS' index factory, for example `HNSW32` or `IVF1024,Flat`.
        dim: dimensions of a vector.
        blocks: called without arguments, returns the (rows, dim) blocks in order.
        count: rows in all blocks.
        path: of the file to write.

    Raises:
        ValueError: FAISS is not installed, or does not understand `spec`.
    """
    library = faiss()
    try:
        index = library.index_factory(dim, spec, library.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"approximate: {spec!r} is not understood by FAISS; use for example HNSW32 or IVF1024,Flat"
        ) from error
    if not index.is_trained:
        step = max(1, count // (_ROWS_PER_CENTRE * getattr(index, "nlist", count)))
        index.train(np.concatenate([block[::step] for block in blocks()]))
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    library.write_index(index, str(path))


def read_graph(path: Path):
    """The FAISS index in a file."""
    return faiss().read_index(str(path))


def search_graph(index, queries: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, (Q, keep), best first; the row is -1 if fewer than `keep` were found."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = 2 * keep
    if hasattr(index, "nprobe"):
        index.nprobe = math.isqrt(index.nlist)
    return index.search(np.ascontiguousarray(queries), keep)
