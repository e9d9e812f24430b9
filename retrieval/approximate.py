"""An approximate first stage with FAISS: a graph or inverted lists over the first dimensions."""

import contextlib
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

# k-means needs some rows per centre; more than this many make it slower, not better.
_ROWS_PER_CENTRE = 64
# How the file of every FAISS index of vectors starts: its kind, d, ntotal, two unused numbers, is_trained, metric_type
# (write_index_header in faiss/impl/index_write.cpp).
_HEADER = struct.Struct("<4siqqq?i")
# What is built: a graph with M neighbours of each vector, or so many inverted lists. FAISS' factory knows more names,
# but some end the process (HNSW0), and some do not keep the vectors that scores are made of.
_SPEC = re.compile(r"HNSW([1-9]\d*)(?:,Flat)?|IVF([1-9]\d*),Flat")
_MOST_NEIGHBOURS = 512


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
        spec: `HNSW` with the neighbours of each vector, or `IVF` with a number of lists, as FAISS' index factory reads
            them: for example `HNSW32` or `IVF1024,Flat`.
        dim: dimensions of a vector.
        blocks: called without arguments, returns the (rows, dim) blocks in order.
        count: rows in all blocks.
        path: of the file to write.

    Raises:
        ValueError: FAISS is not installed, `spec` is another one, or there are fewer vectors than lists.
    """
    library = faiss()
    check_spec(spec, count)
    index = library.index_factory(dim, spec, library.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        step = max(1, count // (_ROWS_PER_CENTRE * getattr(index, "nlist", count)))
        index.train(np.concatenate([block[::step] for block in blocks()]))
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    library.write_index(index, str(path))


def check_spec(spec: str, count: int | None = None) -> None:
    """ValueError unless FAISS can build the index that `spec` names, of `count` vectors if the number is known."""
    match = re.fullmatch(_SPEC, spec)
    if match is None:
        raise ValueError(f"approximate: {spec!r} is not understood by FAISS; use for example HNSW32 or IVF1024,Flat")
    neighbours, lists = (int(number) if number else None for number in match.groups())
    if neighbours is not None and not 2 <= neighbours <= _MOST_NEIGHBOURS:
        raise ValueError(f"approximate: {spec!r} is not allowed; use HNSW2 to HNSW{_MOST_NEIGHBOURS}")
    if lists is not None and count is not None and lists > count:
        raise ValueError(f"approximate: {spec!r} needs at least {lists} vectors, but there are {count}")


def read_graph(path: Path, dim: int, count: int, file: BinaryIO | None = None):
    """The FAISS index in a file, which must be one of `build_graph`.

    Args:
        path: of the file.
        dim: dimensions of its vectors.
        count: number of its vectors.
        file: the file, if it was opened before; `path` is for messages then.

    Raises:
        ValueError: FAISS is not installed, or the file is not an index of `count` vectors of `dim` dimensions with
            inner products.
    """
    library = faiss()
    with contextlib.nullcontext(file) if file is not None else open(path, "rb") as opened:
        opened.seek(0)
        header = opened.read(_HEADER.size)
        # Read before FAISS reads the rest, which trusts the file.
        found = _HEADER.unpack(header) if len(header) == _HEADER.size else None
        if found is None or found[1:3] != (dim, count) or found[6] != library.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"path: {path} is not a graph of {count} vectors of {dim} dimensions; build the index again"
            )
        opened.seek(0)
        try:
            index = library.read_index(library.PyCallbackIOReader(opened.read))
        except RuntimeError as error:
            raise ValueError(f"path: {path} cannot be read by FAISS; build the index again") from error
    if (index.d, index.ntotal, index.metric_type) != (dim, count, library.METRIC_INNER_PRODUCT):
        raise ValueError(f"path: {path} is not a graph of {count} vectors of {dim} dimensions; build the index again")
    return index


def search_graph(index, queries: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, (Q, keep), best first; the row is -1 if fewer than `keep` were found."""
    # Settings of the index itself would also hold for the searches of other threads.
    library, parameters = faiss(), None
    if hasattr(index, "hnsw"):
        parameters = library.SearchParametersHNSW(efSearch=2 * keep)
    elif hasattr(index, "nprobe"):
        parameters = library.SearchParametersIVF(nprobe=max(1, math.isqrt(index.nlist)))
    return index.search(np.ascontiguousarray(queries), keep, params=parameters)
