"""An approximate first stage with FAISS: a graph or inverted lists over the first dimensions."""

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# k-means needs some rows per centre; more than this many make it slower, not better.
_ROWS_PER_CENTRE = 64
# How the file of every FAISS index of vectors starts: its kind, d, ntotal, two unused numbers, is_trained, metric_type
# (write_index_header in faiss/impl/index_write.cpp).
_HEADER = struct.Struct("<4siqqq?i")


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


def read_graph(path: Path, dim: int, count: int):
    """The FAISS index in a file, which must be one of `build_graph`.

    Args:
        path: of the file.
        dim: dimensions of its vectors.
        count: number of its vectors.

    Raises:
        ValueError: FAISS is not installed, or the file is not an index of `count` vectors of `dim` dimensions with
            inner products.
    """
    library = faiss()
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    # Read before FAISS reads the rest, which trusts the file.
    found = _HEADER.unpack(header) if len(header) == _HEADER.size else None
    if found is None or found[1:3] != (dim, count) or found[6] != library.METRIC_INNER_PRODUCT:
        raise ValueError(f"path: {path} is not a graph of {count} vectors of {dim} dimensions; build the index again")
    try:
        index = library.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"path: {path} cannot be read by FAISS; build the index again") from error
    if (index.d, index.ntotal, index.metric_type) != (dim, count, library.METRIC_INNER_PRODUCT):
        raise ValueError(f"path: {path} is not a graph of {count} vectors of {dim} dimensions; build the index again")
    return index


def search_graph(index, queries: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, (Q, keep), best first; the row is -1 if fewer than `keep` were found."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = 2 * keep
    if hasattr(index, "nprobe"):
        index.nprobe = math.isqrt(index.nlist)
    return index.search(np.ascontiguousarray(queries), keep)
