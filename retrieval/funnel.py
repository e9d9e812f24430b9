"""FunnelIndex: exact search in stages, from few dimensions of all vectors to all dimensions of a few.

Matryoshka Representation Learning's adaptive retrieval and funnel retrieval (Kusupati et al. 2022, section 4.3.1).
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .approximate import build_graph, faiss, read_graph, search_graph
from .stages import APPROXIMATE, PRECISIONS, Stage, check_stages, select
from .store import Writer, read

VECTORS, IDS, TEXTS, OFFSETS, GRAPH = "vectors.f32", "ids", "texts.utf8", "text_offsets", "graph.faiss"
# Numbers (scores, copied entries) that are held at once, vectors that are written at once, and entries of a small
# precision that are made float32 at once: few enough to stay in a processor's cache.
_SCORES, _ROWS, _CACHED = 2**23, 2**14, 2**18
# For int8: so many standard deviations of a random unit vector's entries become 127.
_DEVIATIONS = 4


class FunnelIndex:
    """
    Unit vectors on disk, and copies of their first dimensions for the first stage of a search.

    Use `FunnelIndex.build` to make one and `FunnelIndex.open` to open it; `search` finds neighbours.
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
        # The place of each id in sorted order, by which ties are broken.
        self._rank = None if ids is None else np.argsort(np.argsort(self._ids, kind="stable"), kind="stable")

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
        """
        Write an index and open it.

        Args:
            embeddings: (N, width), or blocks of such rows one after the other, of which one is held at a time. They
                are normalised here, and are not changed.
            path: the index's folder, which appears when it is complete.
            prefixes: what first stages will ask for: dims, or (dim, `int8` or `binary`). Each is a copy of the
                vectors' first dimensions; without one, a first stage reads them out of the whole vectors.
            ids: N distinct ids; the row's number when left out. Equal scores are ordered by id.
            texts: N texts, which `text` gives back.
            model: what made the vectors (name, num_layers, ...); `open` can be told to insist on it.
            approximate: dim and FAISS' name of a graph for an approximate first stage, as in (32, "HNSW32") or
                (32, "IVF1024,Flat"); needs the extra `faiss`.
            overwrite: replace an index that stands there.

        Raises:
            ValueError: naming the row, for a vector that is zero or not finite, or the argument.
        """
        wanted = [(prefix, "float32") if isinstance(prefix, int) else tuple(prefix) for prefix in prefixes]
        blocks = [embeddings] if hasattr(embeddings, "shape") else embeddings
        if approximate is not None:
            faiss()
        writer = Writer(path, overwrite)
        try:
            count, width = 0, None
            for block in blocks:
                for start in range(0, len(block), _ROWS):
                    rows = _unit(block[start : start + _ROWS], width, count, "embeddings")
                    if width is None:
                        width = rows.shape[1]
                        _check_prefixes([*wanted, *([(approximate[0], "float32")] if approximate else [])], width)
                    writer.append(VECTORS, rows)
                    for dim, precision in wanted:
                        writer.append(_file(dim, precision), _prefix(rows, dim, precision))
                    count += len(rows)
            if count == 0:
                raise ValueError("embeddings: there are none")
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
        """
        Open an index; its arrays stay on disk and are read as they are needed.

        Args:
            model: what must have made the vectors, as it was given to `build`.
            verify: compare every file's checksum, which reads the whole index once.

        Raises:
            ValueError: the folder is no index, a file of it is missing, cut off or damaged, or the model is another.
        """
        meta, arrays = read(path, verify)
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
        """Whether `text` can be asked."""
        return TEXTS in self._arrays

    def text(self, id) -> str:
        """The text of an id."""
        if not self.has_texts:
            raise ValueError("texts: this index was built without them")
        row = int(np.flatnonzero(self._ids == id)[0]) if self._ids is not None else int(id)
        first, last = self._arrays[OFFSETS][row : row + 2]
        return bytes(self._arrays[TEXTS][first:last]).decode("utf-8")

    def search(
        self, queries: np.ndarray, k: int = 10, stages: Sequence[Stage | tuple] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        The nearest vectors of each query by cosine similarity.

        Args:
            queries: (Q, width) or (width,); they are normalised here, and are not changed.
            k: results of a query.
            stages: (dim, keep) or (dim, keep, precision) of each stage; one exact stage at the full width when left
                out. The last stage's scores are returned.

        Returns:
            scores and ids, (Q, k) or (k,), best first; of equal scores, the lower id first. `seconds` then holds the
            time of each stage.
        """
        single = np.ndim(queries) == 1
        queries = _unit(np.atleast_2d(np.asarray(queries)), self.width, 0, "queries")
        stages = check_stages(stages or [(self.width, k)], k, len(self), self.width)
        self._check_graph(stages[0])
        first, *others = [stage._replace(keep=min(stage.keep, len(self))) for stage in stages]
        self.seconds = []
        start = time.perf_counter()
        scores, rows = (self._graph if first.precision == APPROXIMATE else self._first)(queries, first)
        self.seconds.append(time.perf_counter() - start)
        for stage in others:
            start = time.perf_counter()
            scores, rows = self._again(queries, rows, stage)
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
            self._faiss = read_graph(self.path / GRAPH)
        scores, rows = search_graph(self._faiss, _prefix(queries, stage.dim, "float32"), stage.keep)
        if (rows < 0).any():
            found = int((rows >= 0).sum(axis=1).min())
            raise ValueError(f"stages: the graph found {found} vectors where {stage} keeps {stage.keep}; keep fewer")
        return scores, rows

    def _again(self, queries: np.ndarray, rows: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best among each query's own, at more dimensions."""
        asked, results = _prefix(queries, stage.dim, "float32"), []
        for query, own in zip(asked, rows, strict=True):
            scores = _prefix(self.vectors[own, : stage.dim], stage.dim, "float32") @ query
            top = select(scores, min(stage.keep, len(own)), own if self._rank is None else self._rank[own])
            results.append((scores[top], own[top]))
        return np.stack([r[0] for r in results]), np.stack([r[1] for r in results])

    def _merge(self, left, right, keep: int):
        if not len(left[0]):
            return right
        scores, rows = (np.concatenate(pair) for pair in zip(left, right, strict=True))
        top = select(scores, min(keep, len(scores)), rows if self._rank is None else self._rank[rows])
        return scores[top], rows[top]


def _unit(rows, width: int | None, first: int, name: str) -> np.ndarray:
    """Rows of unit norm in float32, a copy; ValueError naming a row that has no direction."""
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
    """The first dims of unit vectors, of unit norm again, in a precision; bits are 64 to a number."""
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
    """(Q, rows): cosine similarity, or for bits the share that agrees."""
    if stage.precision == "float32":
        return _products(queries, rows)
    step = max(1, _CACHED // stage.dim)
    parts = [_score_small(queries, rows[start : start + step], stage) for start in range(0, len(rows), step)]
    return np.concatenate(parts, axis=1)


def _score_small(queries: np.ndarray, rows: np.ndarray, stage: Stage) -> np.ndarray:
    if stage.precision == "int8":
        return _products(queries * (_DEVIATIONS / (127 * stage.dim**0.5)), rows.astype(np.float32))
    ones = np.ones(rows.shape[1], np.float32)  # a product with it is the fastest sum of a few columns
    apart = np.stack([np.bitwise_count(rows ^ query).astype(np.float32) @ ones for query in queries])
    return 1 - apart / stage.dim


def _products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return queries @ rows.T if len(queries) > 1 else (rows @ queries[0])[None]


def _append_graph(writer: Writer, dim: int, spec: str, count: int) -> None:
    vectors = writer.array(VECTORS)

    def blocks() -> Iterator[np.ndarray]:
        return (_prefix(vectors[start : start + _ROWS], dim, "float32") for start in range(0, count, _ROWS))

    build_graph(spec, dim, blocks, count, writer.add_file(GRAPH))


def _append_companions(writer: Writer, ids, texts, count: int) -> None:
    if ids is not None:
        ids = np.asarray(ids)
        if len(ids) != count:
            raise ValueError(f"ids: {len(ids)} are given for {count} vectors")
        if len(np.unique(ids)) != count:
            raise ValueError("ids: one of them stands twice")
        writer.append(IDS, ids)
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
