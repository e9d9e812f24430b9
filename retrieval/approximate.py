"""An approximate first stage by FAISS: a graph or inverted lists over the first dimensions."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

# k-means needs some rows a centre; more than these make it slow, not better.
_ROWS_A_CENTRE = 64


def faiss():
    """The library; ValueError where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError('approximate: FAISS is missing; pip install "twodmse[faiss]"') from error
    return faiss


def build_graph(spec: str, dim: int, blocks: Callable, count: int, path: Path) -> None:
    """Build and write a FAISS index for inner products of unit vectors.

    Args:
        spec: of FAISS' index factory, for example `HNSW32` or `IVF1024,Flat`.
        blocks: called without arguments, gives the (rows, dim) blocks from the first to the last.
        count: rows in all.
    """
    library = faiss()
    try:
        index = library.index_factory(dim, spec, library.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"approximate: {spec!r} is not understood by FAISS; HNSW32 and IVF1024,Flat are") from error
    if not index.is_trained:
        step = max(1, count // (_ROWS_A_CENTRE * getattr(index, "nlist", count)))
        index.train(np.concatenate([block[::step] for block in blocks()]))
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    library.write_index(index, str(path))


def read_graph(path: Path):
    """The FAISS index of a file."""
    return faiss().read_index(str(path))


def search_graph(index, queries: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, (Q, keep), best first; the row is -1 where fewer were found."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = 2 * keep
    if hasattr(index, "nprobe"):
        index.nprobe = math.isqrt(index.nlist)
    return index.search(np.ascontiguousarray(queries), keep)
