"""An index in Qdrant: one collection, a named vector per prefix, and the funnel as one request of nested prefetches."""

import contextlib
import os
import pickle
import sqlite3
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Block, Layout, Server
from .stages import APPROXIMATE, Stage
from .vectors import unit_queries

# Options of the collection; `on_disk` is one of each vector and graph.
OPTIONS = ("shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload", "on_disk")
# The collection in a folder of the client's local mode.
_LOCAL = "index"
_META = "meta.json"
_ROWS, _BATCH = 1024, 256
_SECONDS = 60
# What the client's local mode raises for files that are damaged: it uses JSON, SQLite and pickles as it finds them.
_DAMAGED = (sqlite3.Error, pickle.UnpicklingError, AttributeError, EOFError, ImportError, LookupError, RecursionError,
            TypeError, ValueError)  # fmt: skip
# Of the ids of points, which are made of the documents' ids.
_NAMESPACE = uuid.UUID("6f0a2f0e-8a5c-5d3c-9c52-2d2f5a0b7c11")


def _client() -> Any:
    """The client's library; ValueError if it is not installed."""
    try:
        import qdrant_client
    except ImportError as error:
        raise ValueError('engine: Qdrant\'s client is missing; pip install "twodmse[qdrant]"') from error
    return qdrant_client


class Qdrant(Server):
    """A collection whose metadata is the index's description, and whose points have the document's id and text.

    Args:
        place: the collection or, without a URL, the folder of the client's local mode. That mode is exact: it ignores
            precisions and graphs.
        url: of a server or cluster.
        key: API key.
        options: some of `OPTIONS`, for a new collection.

    Raises:
        ValueError: an argument is not allowed, or the client is not installed.
    """

    precisions = ("float32", "float16", "int8", "binary")
    most_neighbours = 512

    def __init__(self, place: str, url: str = "", key: str | None = None, options: dict | None = None):
        unknown = [str(name) for name in options or {} if name not in OPTIONS]
        if unknown:
            raise ValueError(f"engine_options: {', '.join(unknown)} is unknown; choose from {', '.join(OPTIONS)}")
        self._library = _client()
        self._models = self._library.models
        self._options = options or {}
        self._url, self._folder = url, None if url else Path(place)
        self._collection = place if url else _LOCAL
        self.place = f"collection {place} at {url}" if url else str(place)
        self._key, self._opened = key, None
        if self._folder is not None:
            self._check_folder(self._folder)

    @property
    def _connected(self) -> Any:
        """The client, made when it is first used: the local mode makes its folder."""
        if self._opened is None:
            with self._errors():
                self._opened = self._connect()
        return self._opened

    def _connect(self) -> Any:
        if self._folder is None:
            more = {"check_compatibility": False, "timeout": _SECONDS}
            return self._library.QdrantClient(url=self._url, api_key=self._key, **more)
        try:
            return self._library.QdrantClient(path=os.fspath(self._folder))
        except _DAMAGED as error:
            raise ValueError(f"engine: {self.place} is damaged: {type(error).__name__}: {_line(error)}") from error

    def open(self) -> None:
        super().open()
        if self._folder is not None and self.size is not None and self.count() < self.size:
            raise ValueError(f"engine: {self.place} is damaged: it has {self.count()} of its {self.size} vectors")

    def create(self, layout: Layout, overwrite: bool = False) -> None:
        if self.begin(layout, overwrite):
            return
        vectors = {self._name(*entry): self._vector(*entry) for entry in layout.stored()}
        options = {name: value for name, value in self._options.items() if name != "on_disk"}
        with self._errors():
            self._connected.create_collection(
                self._collection, vectors, metadata={"index": layout.describe(), "count": None}, **options
            )

    def _name(self, dim: int, precision: str) -> str:
        return str(dim) if precision == "float32" else f"{dim}-{precision}"

    def _vector(self, dim: int, precision: str) -> Any:
        """The parameters of what is stored. Without a graph, Qdrant scans the vectors."""
        models, on_disk = self._models, self._options.get("on_disk")
        quantization = {
            "int8": models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8)),
            "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig()),
        }
        return models.VectorParams(
            size=dim,
            distance=models.Distance.COSINE,
            datatype=models.Datatype.FLOAT16 if precision == "float16" else None,
            quantization_config=quantization.get(precision),
            hnsw_config=models.HnswConfigDiff(m=self.layout.neighbours().get((dim, precision), 0), on_disk=on_disk),
            on_disk=on_disk,
        )

    def add(
        self,
        blocks: Iterable[Block],
        texts: Iterable[str] | None = None,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> int:
        new = 0
        for ids, rows, own in self.parts(blocks, texts, _ROWS):
            with self._errors():
                new += self._upsert(ids, rows, own)
            progress(len(ids))
        self.size = self.count()
        with self._errors():
            self._connected.update_collection(self._collection, metadata={"count": self.size})
        return new

    def _upsert(self, ids: list[str], rows: np.ndarray, texts: list[str] | None) -> int:
        """Send the points that are new or have changed, as their checksums tell."""
        models = self._models
        payloads: list[dict] = []
        for place, name in enumerate(ids):
            text = {} if texts is None else {"text": texts[place]}
            checksum = zlib.crc32(text.get("text", "").encode("utf-8"), zlib.crc32(rows[place].tobytes()))
            payloads.append({"id": name, "checksum": checksum, **text})
        points = [str(uuid.uuid5(_NAMESPACE, name)) for name in ids]
        there = self._connected.retrieve(self._collection, points, with_payload=["checksum"])
        known = {point.id: point.payload.get("checksum") for point in there}
        new = [place for place, point in enumerate(points) if known.get(point) != payloads[place]["checksum"]]
        if new:
            vectors = {self._name(*entry): rows[new, : entry[0]] for entry in self.layout.stored()}
            changed = [points[place] for place in new if points[place] in known]
            fields = models.PayloadSelectorExclude(exclude=["id", "checksum", "text"])
            there = self._connected.retrieve(self._collection, changed, with_payload=fields) if changed else []
            more = {point.id: point.payload for point in there}  # what others have added to a point is kept
            self._connected.upload_collection(
                self._collection,
                vectors,
                payload=[more.get(points[place], {}) | payloads[place] for place in new],
                ids=[points[place] for place in new],
                batch_size=_BATCH,
                wait=True,
            )
        return len(new)

    def search(
        self, queries: np.ndarray, k: int = 10, stages: Sequence[Stage | tuple] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, checked = unit_queries(queries, self.layout.width), self.check_stages(stages, k)
        start = time.perf_counter()
        with self._errors():
            requests = [self._request(row, checked) for row in rows]
            answers = self._connected.query_batch_points(self._collection, requests)
        found = [[(point.score, point.payload["id"]) for point in answer.points] for answer in answers]
        self.seconds = [time.perf_counter() - start]
        return self.results([sorted(own, key=lambda pair: (-pair[0], pair[1])) for own in found], k)

    def _request(self, row: np.ndarray, stages: Sequence[Stage]) -> Any:
        """One request for all stages, each around the one before it."""
        models, inner = self._models, None
        for stage in stages[:-1]:
            inner = models.Prefetch(prefetch=inner, limit=stage.keep, **self._query(row, stage, inner is None))
        last = self._query(row, stages[-1], inner is None)
        return models.QueryRequest(prefetch=inner, limit=stages[-1].keep, with_payload=["id"], **last)

    def _query(self, row: np.ndarray, stage: Stage, is_first: bool) -> dict[str, Any]:
        models, (dim, precision) = self._models, self.layout.find(stage)
        params: dict[str, Any] = {"hnsw_ef": 2 * stage.keep} if stage.precision == APPROXIMATE else {}
        if precision in ("int8", "binary"):
            # `exact` would read the original vectors, and so would rescoring, which the next stage is for.
            params["quantization"] = models.QuantizationSearchParams(rescore=False)
        elif stage.precision != APPROXIMATE:
            params["exact"] = True
        query = {"query": row[:dim].tolist(), "using": self._name(dim, precision)}
        has_settings = is_first and self._folder is None  # the local mode warns of what it ignores
        return {**query, "params": models.SearchParams(**params)} if has_settings else query

    def texts(self, ids: Sequence[str]) -> list[str]:
        points = [str(uuid.uuid5(_NAMESPACE, name)) for name in ids]
        with self._errors():
            there = self._connected.retrieve(self._collection, points, with_payload=["text"])
        found = {point.id: point.payload.get("text", "") for point in there}
        return [found.get(point, "") for point in points]

    def count(self) -> int:
        with self._errors():
            return self._connected.count(self._collection, exact=True).count

    def drop(self) -> None:
        if self._read() is not None:
            with self._errors():
                self._connected.delete_collection(self._collection)
        self.size = None

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _read(self) -> tuple[Layout, int | None] | None:
        """The layout and size in the metadata; None without a collection, ValueError if the collection is another."""
        if self._folder is not None and not (self._folder / _META).is_file():
            return None
        with self._errors():
            if not self._connected.collection_exists(self._collection):
                return None
            content = self._connected.get_collection(self._collection).config.metadata
        try:
            layout, size = Layout.read(content["index"], "metadata"), content["count"]
            self.check_layout(layout)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"collection: {self.place} exists and is not an index of build_index.py") from error
        return layout, size if type(size) is int else None

    def _check_folder(self, folder: Path) -> None:
        is_ours = not folder.exists() or (folder.is_dir() and ((folder / _META).is_file() or not any(folder.iterdir())))
        if not is_ours:
            raise ValueError(
                f"output_dir: {folder} has something else than a collection of Qdrant; name another folder"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the server refuses, or that there is none, as a ValueError of one line."""
        from qdrant_client.http import exceptions

        try:
            yield
        except exceptions.UnexpectedResponse as error:
            if error.status_code in (401, 403):
                raise ValueError(f"engine_api_key_env: {self._url} refuses the key") from error
            raise ValueError(f"engine: {self.place}: {_line(error)}") from error
        except exceptions.ApiException as error:  # of requests that got no answer
            reason = getattr(error, "source", error)
            raise ValueError(f"engine_url: {self._url} cannot be reached: {_line(reason)}") from error
        except RuntimeError as error:  # of a folder that another process has open
            raise ValueError(f"engine: {self.place}: {_line(error)}") from error


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
