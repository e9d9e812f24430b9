"""Search among a million vectors: funnels against exact search by numpy at the full width."""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from modeling_2dmse import TwoDMSEModel
from retrieval import FunnelIndex, parse_stages
from run_scripts.shared import models
from run_scripts.shared.measure import in_turn, row
from trainer.evaluation import RetrievalData
from trainer.ranking import ranking_metrics

ROOT = Path(__file__).resolve().parents[2]
COUNT, K, SINGLE, BATCH = 1_000_000, 10, 30, 64
# The length of the noise that makes many vectors of one, and a query of a vector.
NOISE = 0.5
EXACT = ("32:1000,384:10", "32:2000,384:10", "64:1000,384:10", "64:1000:int8,384:10", "384:2000:binary,384:10")
FUNNELS = (*EXACT, *(f"64:{keep}:approximate,384:10" for keep in (200, 500, 1000, 2000)))
GRAPH = (64, "HNSW32")
# Funnels for real questions, where the corpus is small.
JUDGED = ("32:10", "32:50,384:10", "32:200,384:10", "32:200,128:50,384:10", "64:100,384:10", "384:100:binary,384:10")


def funnel_cost(args, texts: list[str]) -> list[dict]:
    """Ratios of time, exact over funnel, for single queries and batches, with recall@10; peak memory.

    Args:
        args: the benchmark's arguments.
        texts: their embeddings are the centres of the million vectors.
    """
    model = models.to_device(
        models.load_encoder(args.model_name_or_path, args.sizes, trust_remote_code=args.trust_remote_code)
    )
    centres = model.encode(texts, max_length=args.max_length)
    funnels = {text: parse_stages(text) for text in FUNNELS}
    prefixes = {(s[0].dim, s[0].precision) for s in funnels.values() if s[0].precision != "approximate"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        start = time.perf_counter()
        index = FunnelIndex.build(many(centres, COUNT), path, sorted(prefixes), approximate=GRAPH)
        print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
        queries = next(many(centres, BATCH, seed=1))
        rows = []
        for name, asked in (("single", queries[:SINGLE]), ("batch", queries)):
            rows += _compare(index, asked, name, funnels, args.runs)
        stored = index.vectors.nbytes / 1e9
        for text in funnels:
            peak = _peak(path, queries, text)
            rows.append(row(f"funnel.memory.{text}", "<= 1.3", [peak - 0.2], [stored], peak_gb=peak))
    return rows


def funnel_quality(args, tasks: list[RetrievalData]) -> list[dict]:
    """nDCG@10 of funnels over that of exact search at the full width, on each task."""
    model = models.to_device(
        models.load_encoder(args.model_name_or_path, args.sizes, trust_remote_code=args.trust_remote_code)
    )
    return [line for task in tasks for line in _judge(model, task, args.max_length)]


def _judge(model: TwoDMSEModel, task: RetrievalData, max_length: int) -> list[dict]:
    """The rows of one task."""
    documents = model.encode(list(task.corpus.values()), max_length=max_length)
    queries = model.encode(list(task.queries.values()), max_length=max_length)
    gains = [task.qrels[query] for query in task.queries]
    with tempfile.TemporaryDirectory() as folder:
        index = FunnelIndex.build(documents, Path(folder) / "index", ids=list(task.corpus))

        def ndcg(stages) -> float:
            _, ids = index.search(queries, K, stages)
            return ranking_metrics(ids.tolist(), gains)["ndcg@10"]

        exact = ndcg(None)
        scores = {text: ndcg(parse_stages(text)) for text in JUDGED}
    target = f"of {exact:.4f}, exact"
    return [row(f"funnel.ndcg.{task.name}.{text}", target, [s], [exact], ndcg=s) for text, s in scores.items()]


def many(centres: np.ndarray, count: int, seed: int = 0):
    """Yield `count` vectors in blocks, each a centre plus noise of a fixed expected length."""
    rng = np.random.default_rng(seed)
    scale = NOISE / centres.shape[1] ** 0.5
    for start in range(0, count, 2**16):
        rows = centres[rng.integers(len(centres), size=min(2**16, count - start))]
        yield rows + rng.normal(scale=scale, size=rows.shape).astype(np.float32)


def exact_search(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Exact search in three lines of numpy: the rows of the ten best vectors of each query; all are unit vectors."""
    scores = queries @ vectors.T if len(queries) > 1 else (vectors @ queries[0])[None]
    best = np.argpartition(scores, -K, axis=1)[:, -K:]
    order = np.take_along_axis(scores, best, axis=1).argsort(axis=1)[:, ::-1]
    return np.take_along_axis(best, order, axis=1)


def _compare(index: FunnelIndex, queries: np.ndarray, name: str, funnels: dict, runs: int) -> list[dict]:
    """Rows of exact search and all funnels, for single queries one after another or all queries at once."""
    vectors = np.array(index.vectors)  # in memory, where numpy is fastest
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    parts = [queries[i : i + 1] for i in range(len(queries))] if name == "single" else [queries]
    found: dict[str, list] = {}

    def timed(label: str, search) -> float:
        times = []
        found[label] = []
        for part in parts:
            start = time.perf_counter()
            found[label].append(search(part))
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    sides = {"exact": partial(timed, "exact", partial(exact_search, vectors))}
    for text, stages in funnels.items():
        sides[text] = partial(timed, text, lambda part, stages=stages: index.search(part, K, stages)[1])
    in_turn(1, sides)
    taken = in_turn(runs, sides)
    truth = np.concatenate(found["exact"])
    rows = []
    for text in funnels:
        same = [len(set(a) & set(b)) / K for a, b in zip(truth, np.concatenate(found[text]), strict=True)]
        target = ">= 8" if name == "single" else "none"
        line = row(f"funnel.{name}.{text}", target, taken["exact"], taken[text], recall=float(np.mean(same)))
        rows.append(line | {"seconds": taken[text], "exact_seconds": taken["exact"]})
        print(f"{line['id']}: recall@{K} {line['recall']:.4f}", flush=True)
    return rows


def _peak(path: Path, queries: np.ndarray, stages: str) -> float:
    """Most memory, in GB, of a separate process that searches one query at a time and then all at once."""
    asked = path.with_name("queries.npy")
    np.save(asked, queries)
    command = [sys.executable, "-m", "run_scripts.shared.peak", str(path), str(asked), stages, str(K)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)
