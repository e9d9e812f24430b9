"""Engines that keep an index: one small interface over FunnelIndex, Qdrant and PostgreSQL, searched by the same stages.

What an engine has (storage, graphs, filters, replication, retries) is left to it.
"""

import abc
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from .checking import Kinds, check_fields
from .contents import check_prefixes
from .funnel import FunnelIndex
from .stages import APPROXIMATE, Stage, check_stages
from .store import check_only_index
from .vectors import unit

ENGINES = ("local", "qdrant", "pgvector")
# Ids and vectors that belong together.
Block = tuple[list[str], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """What an index stores, besides the vectors at their full width.

    Args:
        width: dimensions of a vector.
        prefixes: the first dimensions that are stored as well, and their precision.
        graphs: dims of approximate first stages, and the name of their graph: `HNSW` with the number of neighbours.
        model: how queries must be embedded, and what identifies the model.
    """

    width: int
    prefixes: tuple[tuple[int, str], ...] = ()
    graphs: tuple[tuple[int, str], ...] = ()
    model: dict | None = None

    def describe(self) -> dict[str, Any]:
        """The layout as JSON has it."""
        prefixes, graphs = [list(entry) for entry in self.prefixes], [list(entry) for entry in self.graphs]
        return {"width": self.width, "prefixes": prefixes, "graphs": graphs, "model": self.model}

    @classmethod
    def read(cls, description: Any, what: str) -> "Layout":
        """The layout of a description; ValueError, which starts with `what`, if `describe` did not write it."""
        kinds: Kinds = {"width": int, "prefixes": list, "graphs": list, "model": (dict, type(None))}
        fields = check_fields(description, kinds, what)
        for entry in fields["prefixes"] + fields["graphs"]:
            if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and type(entry[1]) is str):
                raise ValueError(f"{what}: {entry!r} is not a dim and a name")
        prefixes, graphs = (tuple((dim, name) for dim, name in fields[part]) for part in ("prefixes", "graphs"))
        return cls(fields["width"], prefixes, graphs, fields["model"])

    def stored(self) -> list[tuple[int, str]]:
        """Everything that is stored: the prefixes, those of the graphs, and the whole vectors."""
        dims = [dim for dim, _ in self.prefixes] + [self.width]
        more = [(dim, "float32") for dim, _ in self.graphs if dim not in dims]
        return list(dict.fromkeys([*self.prefixes, *more, (self.width, "float32")]))

    def neighbours(self) -> dict[tuple[int, str], int]:
        """The number of neighbours of each graph, by what is stored: the first entry with the graph's dim."""
        first = {dim: (dim, precision) for dim, precision in reversed(self.stored())}
        return {first[dim]: int(spec.removeprefix("HNSW")) for dim, spec in self.graphs}

    def find(self, stage: Stage) -> tuple[int, str]:
        """What is stored for a stage; ValueError if there is nothing."""
        stored = self.stored()
        if stage.precision == APPROXIMATE:
            for entry in self.neighbours():
                if entry[0] == stage.dim:
                    return entry
            graphs = ", ".join(str(dim) for dim, _ in self.graphs) or "none"
            raise ValueError(f"stages: {stage} needs a graph of {stage.dim} dimensions; this index has {graphs}")
        if (stage.dim, stage.precision) not in stored:
            has = ", ".join(f"{dim}:{precision}" for dim, precision in stored)
            raise ValueError(f"stages: {stage} needs {stage.dim}:{stage.precision}; this index has {has}")
        return stage.dim, stage.precision


class Engine(abc.ABC):
    """An index in an engine. A new one gets `create`, then `add`; an existing one is opened when it is first used.

    Attributes:
        place: the index in messages.
        size: vectors in the index when `add` was last finished; None if it never was.
        seconds: time of each stage of the last search, or of all of them together.
    """

    place: str
    size: int | None = None
    seconds: Sequence[float] = ()
    _layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """What the index stores. An index that was neither created nor opened is opened."""
        if self._layout is None:
            self.open()
        return cast(Layout, self._layout)

    @layout.setter
    def layout(self, layout: Layout) -> None:
        self._layout = layout

    @abc.abstractmethod
    def open(self) -> None:
        """Read the layout, and so learn at once whether there is an index; ValueError if there is none."""

    @abc.abstractmethod
    def create(self, layout: Layout, overwrite: bool = False) -> None:
        """Prepare an index for `add`; one with the same layout is kept, so that `add` completes it.

        Args:
            layout: what it stores.
            overwrite: whether an index that is there is dropped first.

        Raises:
            ValueError: there is an index of another model or layout, or the engine cannot store the layout.
        """

    @abc.abstractmethod
    def add(
        self,
        blocks: Iterable[Block],
        texts: Iterable[str] | None = None,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> int:
        """Add vectors by id. Those that the index already has, unchanged, are left alone.

        Args:
            blocks: ids and (rows, width) vectors.
            texts: the text of each id, in the same order.
            progress: called with the rows of each finished part.

        Returns:
            How many vectors were new or have changed.

        Raises:
            ValueError: an id is not a text or appears twice, or a vector is zero or not finite.
        """

    @abc.abstractmethod
    def search(
        self, queries: np.ndarray, k: int = 10, stages: Sequence[Stage | tuple] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest vectors of each query by cosine similarity, as `FunnelIndex.search` returns them.

        Args:
            queries: (Q, width).
            k: results per query.
            stages: default: one exact stage at the full width. Every stage is exact, except an `approximate` first
                stage, which uses the graph.

        Returns:
            Scores of the last stage and ids, (Q, k), best first; of equal scores, the lower id first.

        Raises:
            ValueError: there is no query, one is zero or not finite, or `k` or `stages` is not allowed.
        """

    @abc.abstractmethod
    def check_stages(self, stages: Sequence[Stage | tuple] | None, k: int) -> list[Stage]:
        """The stages that `search` uses; ValueError if the index cannot be searched with them."""

    @abc.abstractmethod
    def texts(self, ids: Sequence[str]) -> list[str]:
        """The texts of ids, empty for those without one."""

    @abc.abstractmethod
    def count(self) -> int:
        """The number of vectors, also of an index that is not complete."""

    @abc.abstractmethod
    def drop(self) -> None:
        """Delete the index; ValueError if what is in its place is not an index."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""


class Local(Engine):
    """The embedded engine: a `FunnelIndex` in a folder, which appears when it is complete.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.place = str(path)
        self.index: FunnelIndex | None = None
        self._overwrite = False

    def open(self) -> None:
        self.index = FunnelIndex.open(self.place)
        meta = self.index.meta
        prefixes = tuple((entry["dim"], entry["precision"]) for entry in meta["prefixes"])
        graphs = () if meta["graph"] is None else ((meta["graph"]["dim"], meta["graph"]["spec"]),)
        self.layout = Layout(self.index.width, prefixes, graphs, meta["model"])
        self.size = len(self.index)

    def create(self, layout: Layout, overwrite: bool = False) -> None:
        if len(layout.graphs) > 1:
            raise ValueError("approximate: the local engine has one graph at most; name one")
        self.layout, self._overwrite = layout, overwrite

    def add(self, blocks, texts=None, progress=lambda rows: None) -> int:
        ids: list[str] = []

        def vectors() -> Iterator[np.ndarray]:
            for names, rows in blocks:
                ids.extend(names)
                yield rows
                progress(len(rows))

        layout, graph = self.layout, self.layout.graphs[0] if self.layout.graphs else None
        more: dict[str, Any] = {"ids": ids, "texts": texts, "model": layout.model, "approximate": graph}
        FunnelIndex.build(vectors(), self.place, layout.prefixes, overwrite=self._overwrite, **more)
        self.open()
        return len(ids)

    def search(self, queries, k=10, stages=None):
        found = self._opened().search(np.atleast_2d(queries), k, stages)
        self.seconds = self._opened().seconds
        return found

    def check_stages(self, stages, k: int) -> list[Stage]:
        index = self._opened()
        return check_stages(stages or [(index.width, k)], k, len(index), index.width)

    def texts(self, ids: Sequence[str]) -> list[str]:
        index = self._opened()
        return [index.text(name) if index.has_texts else "" for name in ids]

    def count(self) -> int:
        return len(self._opened())

    def drop(self) -> None:
        path = self._opened().path
        check_only_index(path)
        shutil.rmtree(path)
        self.index = None

    def close(self) -> None:
        self.index = None

    def _opened(self) -> FunnelIndex:
        if self.index is None:
            self.open()
        assert self.index is not None
        return self.index


class Server(Engine):
    """What the engines with a client share: the checks of a layout, of blocks and of a search.

    Attributes:
        precisions: what a prefix may be stored in.
        most_neighbours: of a graph.
    """

    precisions: tuple[str, ...]
    most_neighbours: int

    def check_layout(self, layout: Layout) -> None:
        """ValueError if a prefix or graph is not possible."""
        check_prefixes(layout.prefixes, layout.width, allowed=self.precisions)
        for dim, spec in layout.graphs:
            check_prefixes([(dim, "float32")], layout.width, "approximate")
            match = re.fullmatch(r"HNSW([1-9]\d{0,8})", spec)
            if match is None or not 2 <= int(match[1]) <= self.most_neighbours:
                most = self.most_neighbours
                raise ValueError(f"approximate: {spec!r} is not allowed for this engine; use HNSW2 to HNSW{most}")

    def check_same(self, stored: Layout, layout: Layout) -> None:
        """ValueError if the index that is there is not the one to be created."""
        before, now = stored.describe(), layout.describe()
        for part, made in now.items():
            had = before[part]
            if part == "model" and made and had:  # under another name, it may still be the same one
                fields = [name for name in made if name != "name" and had.get(name, made[name]) != made[name]]
                what = f"another model or size (its {', '.join(fields)} differ)" if fields else None
            else:
                what = None if had == made else f"{part} {had}, not {made}"
            if what is not None:
                raise ValueError(
                    f"engine: {self.place} was built with {what}; choose another name or pass --overwrite true"
                )

    def parts(
        self, blocks: Iterable[Block], texts: Iterable[str] | None, size: int
    ) -> Iterator[tuple[list[str], np.ndarray, list[str] | None]]:
        """Checked ids, unit vectors and texts, at most `size` at a time."""
        known: set[str] = set()
        each = None if texts is None else iter(texts)
        for names, rows in blocks:
            if len(names) != len(rows):
                raise ValueError(f"ids: {len(names)} are given for {len(rows)} vectors")
            rows = unit(rows, self.layout.width, len(known), "embeddings")
            for start in range(0, len(names), size):
                ids = names[start : start + size]
                for name in ids:
                    if not isinstance(name, str):
                        raise ValueError(f"ids: {name!r} is not allowed; use texts")
                    if name in known:
                        raise ValueError(f"ids: {name!r} appears twice; ids must be distinct")
                    known.add(name)
                own = None if each is None else list(itertools.islice(each, len(ids)))
                if own is not None and len(own) < len(ids):
                    raise ValueError(f"texts: there are fewer of them than ids, none for {ids[len(own)]!r}")
                yield ids, rows[start : start + size], own
        if each is not None and next(each, None) is not None:
            raise ValueError(f"texts: there are more of them than the {len(known)} ids")

    def begin(self, layout: Layout, overwrite: bool) -> bool:
        """Check what is there before `create` makes an index; whether there is one to add to."""
        self.check_layout(layout)
        found = self._read()
        if found is not None and overwrite:
            self.drop()
            found = None
        if found is not None:
            self.check_same(found[0], layout)
        self.layout, self.size = found or (layout, None)
        return found is not None

    @abc.abstractmethod
    def _read(self) -> tuple[Layout, int | None] | None:
        """The layout and the size of the index, None for one that is not complete; None if there is no index."""

    def open(self) -> None:
        found = self._read()
        if found is None:
            raise ValueError(f"index: there is no {self.place}; build it with build_index.py")
        self.layout, self.size = found

    def check_stages(self, stages, k: int) -> list[Stage]:
        width = self.layout.width  # which opens the index
        if self.size is None:
            raise ValueError(f"index: {self.place} is not complete; run build_index.py again, which adds the rest")
        later = tuple(name for name in self.precisions if name.startswith("float"))
        first = (*self.precisions, APPROXIMATE)
        checked = check_stages(stages or [(width, k)], k, self.size, width, first, later)
        for stage in checked:
            self.layout.find(stage)
        return checked

    def results(self, found: list[list[tuple[float, str]]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids as arrays (Q, k); ValueError if the engine found fewer."""
        fewest = min(map(len, found), default=k)
        if fewest < k:
            raise ValueError(
                f"k: {k} is not allowed; {self.place} found {fewest} vectors, keep more in its first stage"
            )
        scores = np.array([[score for score, _ in own[:k]] for own in found], np.float32).reshape(-1, k)
        ids = np.empty((len(found), k), object)
        ids[:] = [[name for _, name in own[:k]] for own in found]
        return scores, ids


def open_engine(
    name: str,
    place: str,
    url: str = "",
    key: str | None = None,
    options: dict | None = None,
) -> Engine:
    """The engine of a name; its client is imported now.

    Args:
        name: one of `ENGINES`.
        place: folder of the index or, on a server, the name of its collection or table.
        url: of the server; without one, `qdrant` keeps its collection in the folder `place`.
        key: Qdrant's API key.
        options: of Qdrant's collection, see `retrieval.qdrant.OPTIONS`.

    Raises:
        ValueError: the name is unknown, the client is not installed, or the server cannot be reached.
    """
    if name == "qdrant":
        from .qdrant import Qdrant

        return Qdrant(place, url, key, options)
    if name == "pgvector":
        from .pgvector import PgVector

        return PgVector(place, url)
    if name != "local":
        raise ValueError(f"engine: {name!r} is unknown; choose one of {', '.join(ENGINES)}")
    return Local(place)
