"""FunnelIndex: exact search in stages, from few dimensions of all vectors to all dimensions of a few.

Matryoshka Representation Learning's adaptive retrieval and funnel retrieval (Kusupati et al. 2022, section 4.3.1).
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from .approximate import build_graph, faiss, read_graph, search_graph
from .checking import Kinds, check_fields, check_name
from .stages import APPROXIMATE, PRECISIONS, Stage, check_stages, select
from .store import META, Writer, check_file, read

VECTORS, IDS, TEXTS, OFFSETS, GRAPH = "vectors.f32", "ids", "texts.utf8", "text_offsets", "graph.faiss"
# Numbers (scores, copied entries) in memory at once, vectors that are written at once, and entries of a small precision
# that are converted to float32 at once: few enough to stay in a processor's cache.
_SCORES, _ROWS, _CACHED = 2**23, 2**14, 2**18
# For int8: this many standard deviations of a random unit vector's entries become 127. It is the format of
# `modeling_2dmse.formats.quantize`, which retrieval may not import; a test compares the two.
_DEVIATIONS = 4


class FunnelIndex:
    """Unit vectors on disk, and copies of their first dimensions for the first stage of a search.

    `FunnelIndex.build` makes an index, `FunnelIndex.open` opens it, and `search` finds neighbours.

    Args:
        path: the index's folder.
        meta: the description in `index.json`.
        arrays: the files of the index, by name.

    Attributes:
        seconds: time of each stage of the last search.
    """

    def __init__(self, path: str | os.PathLike, meta: dict, arrays: dict[str, np.ndarray]):
        self.path = Path(path)
        self.meta = meta
        self.vectors = arrays[VECTORS]
        self.seconds: list[float] = []
        self._faiss = None
        self._arrays = arrays
        self._prefixes = {(entry["dim"], entry["precision"]): entry["file"] for entry in meta["prefixes"]}
        self._prefixes[meta["width"], "float32"] = VECTORS
        ids = arrays.get(IDS)
        self._ids = None if ids is None else np.asarray(ids)
        # The place of each id in sorted order, which breaks ties.
        self._rank = None if self._ids is None else np.argsort(np.argsort(self._ids, kind="stable"), kind="stable")

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray | Iterable[np.ndarray],
        path: str | os.PathLike,
        prefixes: Sequence[int | tuple[int, str]] = (),
        ids: Sequence[str] | Sequence[int] | None = None,
        texts: Iterable[str] | None = None,
        model: dict | None = None,
        approximate: tuple[int, str] | None = None,
        overwrite: bool = False,
    ) -> "FunnelIndex":
        """Write an index and open it.

        Args:
            embeddings: (N, width), or an iterable of blocks of rows, of which only one is in memory at a time. They are
                normalised for the index; the arrays themselves are not changed.
            path: the index's folder, which appears when it is complete.
            prefixes: what first stages will use: dims, or pairs (dim, `int8` or `binary`). Each is a copy of the
                vectors' first dimensions; without one, a first stage reads them from the whole vectors.
            ids: N distinct ids; default: the row's number. Equal scores are ordered by id.
            texts: N texts, which `text` returns.
            model: a description of the model that made the vectors (name, num_layers, ...), which `open` can check.
            approximate: dim and FAISS' name of a graph for an approximate first stage, for example (32, "HNSW32") or
                (32, "IVF1024,Flat"); needs the extra `faiss`.
            overwrite: whether to replace an existing index.

        Raises:
            ValueError: a vector is zero or not finite (the message names its row), or an argument is not allowed.

        >>> import tempfile
        >>> vectors = np.array([[1.0, 0.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = FunnelIndex.build(vectors, f"{folder}/index", prefixes=[2], ids=["a", "b", "c"])
        ...     scores, ids = index.search(vectors[1], k=2, stages=[(2, 2), (4, 2)])
        >>> ids.tolist()
        ['b', 'a']
        """
        wanted = [(prefix, "float32") if isinstance(prefix, int) else (prefix[0], prefix[1]) for prefix in prefixes]
        blocks = cast("Iterable[np.ndarray]", [embeddings] if hasattr(embeddings, "shape") else embeddings)
        if approximate is not None:
            faiss()
        writer = Writer(path, overwrite)
        try:
            count, width = _append_vectors(writer, blocks, wanted, approximate)
            _append_companions(writer, ids, texts, count)
            if approximate is not None:
                _append_graph(writer, *approximate, count)
            entries = [{"dim": dim, "precision": kind, "file": _file(dim, kind)} for dim, kind in wanted]
            graph = approximate and {"dim": approximate[0], "spec": approximate[1]}
            writer.commit({"count": count, "width": width, "model": model, "prefixes": entries, "graph": graph})
        except BaseException:
            writer.discard()
            raise
        return cls.open(path, verify=False)

    @classmethod
    def open(cls, path: str | os.PathLike, model: dict | None = None, verify: bool = True) -> "FunnelIndex":
        """Open an index; its arrays stay on disk and are read as they are needed.

        Args:
            path: the index's folder.
            model: the description that must have been given to `build`; default: any.
            verify: whether to compare every file's checksum, which reads the whole index once.

        Raises:
            ValueError: the folder is not an index, one of its files is missing, truncated or damaged, or the model is
                another one.
        """
        meta, arrays = read(path, verify)
        try:
            _check_contents(meta, arrays)
        except ValueError as error:
            raise ValueError(f"path: {Path(path) / META} is damaged: {error}") from error
        if model is not None and model != meta["model"]:
            raise ValueError(f"model: {path} was built with {meta['model']}, not with {model}")
        return cls(path, meta, arrays)

    def __len__(self) -> int:
        return self.meta["count"]

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return self.meta["width"]

    @property
    def has_texts(self) -> bool:
        """Whether the index was built with texts."""
        return TEXTS in self._arrays

    def text(self, id: str | int) -> str:
        """The text of an id.

        Raises:
            ValueError: the index was built without texts.
        """
        if not self.has_texts:
            raise ValueError("texts: this index was built without them")
        row = int(np.flatnonzero(self._ids == id)[0]) if self._ids is not None else int(id)
        first, last = self._arrays[OFFSETS][row : row + 2]
        return bytes(self._arrays[TEXTS][first:last]).decode("utf-8")

    def search(
        self, queries: np.ndarray, k: int = 10, stages: Sequence[Stage | tuple] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest vectors of each query by cosine similarity.

        Args:
            queries: (Q, width) or (width,). They are normalised for the search; the array itself is not changed.
            k: results per query.
            stages: (dim, keep) or (dim, keep, precision) of each stage; default: one exact stage at the full width.
                The last stage's scores are returned.

        Returns:
            Scores and ids, (Q, k) or (k,), best first; of equal scores, the lower id first. `seconds` then has the time
            of each stage.

        Raises:
            ValueError: a query is zero or not finite, or `k` or `stages` is not allowed.
        """
        single = np.ndim(queries) == 1
        queries = _unit(np.atleast_2d(np.asarray(queries)), self.width, 0, "queries")
        checked = check_stages(stages or [(self.width, k)], k, len(self), self.width)
        self._check_graph(checked[0])
        first, *others = [stage._replace(keep=min(stage.keep, len(self))) for stage in checked]
        self.seconds = []
        start = time.perf_counter()
        scores, rows = (self._graph if first.precision == APPROXIMATE else self._first)(queries, first)
        self.seconds.append(time.perf_counter() - start)
        for stage in others:
            start = time.perf_counter()
            scores, rows = self._rescore(queries, rows, stage)
            self.seconds.append(time.perf_counter() - start)
        scores, ids = scores[:, :k], rows[:, :k] if self._ids is None else self._ids[rows[:, :k]]
        return (scores[0], ids[0]) if single else (scores, ids)

    def _first(self, queries: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best among all vectors, (Q, keep)."""
        stored = self._prefixes.get((stage.dim, stage.precision))
        asked = _prefix(queries, stage.dim, "binary" if stage.precision == "binary" else "float32")
        block = max(1, _SCORES // max(len(queries), stage.dim if stored is None else 1))  # else rows are copied
        best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
        for start in range(0, len(self), block):
            end = min(start + block, len(self))
            if stored is None:
                rows = _prefix(self.vectors[start:end], stage.dim, stage.precision)
            else:
                rows = self._arrays[stored][start:end]
            scores = _score(asked, rows, stage)
            for query, found in enumerate(scores):
                rank = None if self._rank is None else self._rank[start:end]
                top = select(found, min(stage.keep, len(found)), rank)
                best[query] = self._merge(best[query], (found[top], top + start), stage.keep)
        return np.stack([b[0] for b in best]), np.stack([b[1] for b in best])

    def _check_graph(self, stage: Stage) -> None:
        graph = self.meta["graph"]
        if stage.precision == APPROXIMATE and (graph is None or graph["dim"] != stage.dim):
            has = f"one of {graph['dim']} dimensions" if graph else "none"
            raise ValueError(f"stages: {stage} needs a graph of {stage.dim} dimensions; this index has {has}")

    def _graph(self, queries: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best that the graph finds, (Q, keep)."""
        if self._faiss is None:
            # Whatever `open` has checked, the file may be another one by now.
            check_file(self.path / GRAPH, self.meta["files"][GRAPH])
            self._faiss = read_graph(self.path / GRAPH, stage.dim, len(self))
        scores, rows = search_graph(self._faiss, _prefix(queries, stage.dim, "float32"), stage.keep)
        if (rows < 0).any():
            found = int((rows >= 0).sum(axis=1).min())
            raise ValueError(f"stages: the graph found {found} vectors, but {stage} keeps {stage.keep}; keep fewer")
        return scores, rows

    def _rescore(self, queries: np.ndarray, rows: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best among each query's own rows, at more dimensions."""
        asked, results = _prefix(queries, stage.dim, "float32"), []
        for query, own in zip(asked, rows, strict=True):
            scores = _prefix(self.vectors[own, : stage.dim], stage.dim, "float32") @ query
            top = select(scores, min(stage.keep, len(own)), own if self._rank is None else self._rank[own])
            results.append((scores[top], own[top]))
        return np.stack([r[0] for r in results]), np.stack([r[1] for r in results])

    def _merge(
        self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray], keep: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best of two results."""
        if not len(left[0]):
            return right
        scores, rows = (np.concatenate(pair) for pair in zip(left, right, strict=True))
        top = select(scores, min(keep, len(scores)), rows if self._rank is None else self._rank[rows])
        return scores[top], rows[top]


def _check_contents(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """ValueError unless the fields of `index.json` are those that `build` writes, and the arrays fit them."""
    object_or_none = (dict, type(None))
    kinds: Kinds = {"count": int, "width": int, "model": object_or_none, "prefixes": list, "graph": object_or_none}
    check_fields(meta, kinds, "index")
    count, width = meta["count"], meta["width"]
    if not count or not width:
        raise ValueError(f"index: {count} vectors of {width} dimensions are not allowed")
    expected: dict[str, tuple[np.dtype, tuple[int, ...]]] = {VECTORS: (np.dtype("<f4"), (count, width))}
    for entry in meta["prefixes"]:
        check_fields(entry, {"dim": int, "precision": str, "file": str}, "prefixes")
        dim, precision = entry["dim"], entry["precision"]
        _check_prefixes([(dim, precision)], width)
        if check_name(entry["file"], "prefixes") != _file(dim, precision):
            raise ValueError(f"prefixes: the file {entry['file']} is not {_file(dim, precision)}")
        sample = _prefix(np.zeros((1, dim), np.float32), dim, precision)
        expected[entry["file"]] = sample.dtype, (count, *sample.shape[1:])
    if meta["graph"] is not None:
        check_fields(meta["graph"], {"dim": int, "spec": str}, "graph")
        expected[GRAPH] = np.dtype("u1"), arrays[GRAPH].shape if GRAPH in arrays else ()
    if IDS in arrays:
        expected[IDS] = arrays[IDS].dtype, (count,)
    if TEXTS in arrays or OFFSETS in arrays:
        expected[TEXTS] = np.dtype("u1"), arrays[TEXTS].shape[:1] if TEXTS in arrays else ()
        expected[OFFSETS] = np.dtype("<i8"), (count + 1,)
    for name, (dtype, shape) in expected.items():
        if name not in arrays:
            raise ValueError(f"files: {name} is missing")
        if (arrays[name].dtype, arrays[name].shape) != (dtype, shape):
            raise ValueError(f"files: {name} is {arrays[name].dtype} {arrays[name].shape}, not {dtype} {shape}")
    if OFFSETS in arrays:
        ends = arrays[OFFSETS]
        if ends[0] != 0 or ends[-1] != len(arrays[TEXTS]) or (np.diff(ends) < 0).any():
            raise ValueError(f"files: {OFFSETS} does not fit {TEXTS}")


def _unit(rows, width: int | None, first: int, name: str) -> np.ndarray:
    """A copy of the rows, of unit norm in float32; ValueError that names a row without a direction."""
    rows = np.array(rows, dtype=np.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        raise ValueError(f"{name}: a shape of {rows.shape} is not allowed; use (rows, {width or 'dimensions'})")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(broken):
        what = "zero" if norms[broken[0], 0] == 0 else "not finite"
        raise ValueError(f"{name}: the vector in row {first + broken[0]} is {what}")
    rows /= norms
    return rows


def _check_prefixes(prefixes: Sequence[tuple[int, str]], width: int) -> None:
    for dim, precision in prefixes:
        if not 1 <= dim <= width:
            raise ValueError(f"prefixes: {dim} is not allowed; the vectors have 1 to {width} dimensions")
        if precision not in PRECISIONS:
            raise ValueError(f"prefixes: {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")


def _file(dim: int, precision: str) -> str:
    return f"prefix-{dim}.{precision}"


def _prefix(rows: np.ndarray, dim: int, precision: str) -> np.ndarray:
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


def _score(queries: np.ndarray, rows: np.ndarray, stage: Stage) -> np.ndarray:
    """(Q, rows): cosine similarity, or for bits the share of equal ones."""
    if stage.precision == "float32":
        return _products(queries, rows)
    step = max(1, _CACHED // stage.dim)
    parts = [_score_small(queries, rows[start : start + step], stage) for start in range(0, len(rows), step)]
    return np.concatenate(parts, axis=1)


def _score_small(queries: np.ndarray, rows: np.ndarray, stage: Stage) -> np.ndarray:
    if stage.precision == "int8":
        return _products(queries * (_DEVIATIONS / (127 * stage.dim**0.5)), rows.astype(np.float32))
    ones = np.ones(rows.shape[1], np.float32)  # a product with ones is the fastest sum of a few columns
    different = np.stack([np.bitwise_count(rows ^ query).astype(np.float32) @ ones for query in queries])
    return 1 - different / stage.dim


def _products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return queries @ rows.T if len(queries) > 1 else (rows @ queries[0])[None]


def _append_vectors(
    writer: Writer,
    blocks: Iterable[np.ndarray],
    wanted: Sequence[tuple[int, str]],
    approximate: tuple[int, str] | None,
) -> tuple[int, int]:
    """Write the vectors and their prefixes; returns the number of vectors and their width."""
    count, width = 0, 0
    for block in blocks:
        for start in range(0, len(block), _ROWS):
            rows = _unit(block[start : start + _ROWS], width or None, count, "embeddings")
            if not width:
                width = rows.shape[1]
                _check_prefixes([*wanted, *([(approximate[0], "float32")] if approximate else [])], width)
            writer.append(VECTORS, rows)
            for dim, precision in wanted:
                writer.append(_file(dim, precision), _prefix(rows, dim, precision))
            count += len(rows)
    if count == 0:
        raise ValueError("embeddings: there are no vectors")
    return count, width


def _append_graph(writer: Writer, dim: int, spec: str, count: int) -> None:
    vectors = writer.array(VECTORS)

    def blocks() -> Iterator[np.ndarray]:
        return (_prefix(vectors[start : start + _ROWS], dim, "float32") for start in range(0, count, _ROWS))

    build_graph(spec, dim, blocks, count, writer.add_file(GRAPH))


def _append_companions(
    writer: Writer, ids: Sequence[str] | Sequence[int] | None, texts: Iterable[str] | None, count: int
) -> None:
    """Write the ids and the texts, if any."""
    if ids is not None:
        array = np.asarray(ids)
        if len(array) != count:
            raise ValueError(f"ids: {len(array)} are given for {count} vectors")
        if len(np.unique(array)) != count:
            raise ValueError("ids: one of them appears twice")
        writer.append(IDS, array)
    if texts is None:
        return
    ends = [0]
    for text in texts:
        encoded = text.encode("utf-8")
        writer.append(TEXTS, np.frombuffer(encoded, dtype=np.uint8))
        ends.append(ends[-1] + len(encoded))
    if len(ends) - 1 != count:
        raise ValueError(f"texts: {len(ends) - 1} are given for {count} vectors")
    writer.append(OFFSETS, np.array(ends, dtype=np.int64))
