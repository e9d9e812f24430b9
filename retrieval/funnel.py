"""FunnelIndex: exact search in stages, from few dimensions of all vectors to all dimensions of a few.

Matryoshka Representation Learning's adaptive retrieval and funnel retrieval (Kusupati et al. 2022, section 4.3.1).
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from .approximate import build_graph, check_spec, faiss, read_graph, search_graph
from .contents import (
    GRAPH,
    OFFSETS,
    TEXTS,
    VECTORS,
    append_ids,
    append_texts,
    check_contents,
    check_prefixes,
    file_of,
    read_ids,
)
from .stages import APPROXIMATE, Stage, check_stages, select
from .store import META, Writer, check_file, read
from .vectors import prefix, score, unit, unit_queries

# Numbers (scores, copied entries) in memory at once, and vectors that are written at once.
_SCORES, _ROWS = 2**23, 2**14


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
        self._lock = threading.Lock()
        self._arrays = arrays
        # Opened now: if another index replaces this one, the graph is still that of these vectors.
        self._graph_file = None if meta["graph"] is None else open(self.path / GRAPH, "rb")  # noqa: SIM115
        self._prefixes = {(entry["dim"], entry["precision"]): entry["file"] for entry in meta["prefixes"]}
        self._prefixes[meta["width"], "float32"] = VECTORS
        self._ids = read_ids(arrays)
        self._rows: dict | None = None
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
        pairs = [(prefix, "float32") if isinstance(prefix, int) else (prefix[0], prefix[1]) for prefix in prefixes]
        wanted = list(dict.fromkeys(pairs))
        blocks = cast("Iterable[np.ndarray]", [embeddings] if hasattr(embeddings, "shape") else embeddings)
        if approximate is not None:
            faiss()
            check_spec(approximate[1])
        writer = Writer(path, overwrite)
        try:
            count, width = _append_vectors(writer, blocks, wanted, approximate)
            if ids is not None:
                append_ids(writer, ids, count)
            if texts is not None:
                append_texts(writer, texts, count, "texts", TEXTS, OFFSETS)
            if approximate is not None:
                _append_graph(writer, *approximate, count)
            entries = [{"dim": dim, "precision": kind, "file": file_of(dim, kind)} for dim, kind in wanted]
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
            check_contents(meta, arrays)
            index = cls(path, meta, arrays)
        except ValueError as error:
            raise ValueError(f"path: {Path(path) / META} is damaged: {error}") from error
        if model is not None and model != meta["model"]:
            raise ValueError(f"model: {path} was built with {meta['model']}, not with {model}")
        return index

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
            ValueError: the index was built without texts, or does not have the id.
        """
        if not self.has_texts:
            raise ValueError("texts: this index was built without them")
        if self._ids is not None and self._rows is None:
            self._rows = {name: row for row, name in enumerate(self._ids.tolist())}
        row = id if self._rows is None else self._rows.get(id, -1)
        if not 0 <= int(row) < len(self):
            raise ValueError(f"id: {id!r} is not in this index")
        first, last = self._arrays[OFFSETS][int(row) : int(row) + 2]
        try:
            return bytes(self._arrays[TEXTS][first:last]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"path: {self.path / TEXTS} is damaged: {error}; build the index again") from error

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
            ValueError: there is no query, one is zero or not finite, or `k` or `stages` is not allowed.
        """
        single = np.ndim(queries) == 1
        queries = unit_queries(queries, self.width)
        checked = check_stages(stages or [(self.width, k)], k, len(self), self.width)
        self._check_graph(checked[0])
        first, *others = [stage._replace(keep=min(stage.keep, len(self))) for stage in checked]
        seconds, start = [], time.perf_counter()
        scores, rows = (self._graph if first.precision == APPROXIMATE else self._first)(queries, first)
        seconds.append(time.perf_counter() - start)
        for stage in others:
            start = time.perf_counter()
            scores, rows = self._rescore(queries, rows, stage)
            seconds.append(time.perf_counter() - start)
        self.seconds = seconds
        scores, ids = scores[:, :k], rows[:, :k] if self._ids is None else self._ids[rows[:, :k]]
        return (scores[0], ids[0]) if single else (scores, ids)

    def _first(self, queries: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best among all vectors, (Q, keep)."""
        stored = self._prefixes.get((stage.dim, stage.precision))
        asked = prefix(queries, stage.dim, "binary" if stage.precision == "binary" else "float32")
        block = max(1, _SCORES // max(len(queries), stage.dim if stored is None else 1))  # else rows are copied
        best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
        for start in range(0, len(self), block):
            end = min(start + block, len(self))
            if stored is None:
                rows = prefix(self.vectors[start:end], stage.dim, stage.precision)
            else:
                rows = self._arrays[stored][start:end]
            scores = score(asked, rows, stage)
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
        with self._lock:
            if self._faiss is None:
                path, file = self.path / GRAPH, self._graph_file
                # Whatever `open` has checked, somebody may have written into the file since.
                check_file(path, self.meta["files"][GRAPH], file)
                self._faiss = read_graph(path, stage.dim, len(self), file)
        scores, rows = search_graph(self._faiss, prefix(queries, stage.dim, "float32"), stage.keep)
        if (rows < 0).any():
            found = int((rows >= 0).sum(axis=1).min())
            raise ValueError(f"stages: the graph found {found} vectors, but {stage} keeps {stage.keep}; keep fewer")
        return scores, rows

    def _rescore(self, queries: np.ndarray, rows: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best among each query's own rows, at more dimensions."""
        asked, results = prefix(queries, stage.dim, "float32"), []
        for query, own in zip(asked, rows, strict=True):
            scores = prefix(self.vectors[own, : stage.dim], stage.dim, "float32") @ query
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
            rows = unit(block[start : start + _ROWS], width or None, count, "embeddings")
            if not width:
                width = rows.shape[1]
                check_prefixes(wanted, width)
                if approximate is not None:
                    check_prefixes([(approximate[0], "float32")], width, "approximate")
            writer.append(VECTORS, rows)
            for dim, precision in wanted:
                writer.append(file_of(dim, precision), prefix(rows, dim, precision))
            count += len(rows)
    if count == 0:
        raise ValueError("embeddings: there are no vectors")
    return count, width


def _append_graph(writer: Writer, dim: int, spec: str, count: int) -> None:
    vectors = writer.array(VECTORS)

    def blocks() -> Iterator[np.ndarray]:
        return (prefix(vectors[start : start + _ROWS], dim, "float32") for start in range(0, count, _ROWS))

    build_graph(spec, dim, blocks, count, writer.add_file(GRAPH))
