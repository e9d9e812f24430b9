"""Evaluating the whole grid: against one cell, and against sentence-transformers, which evaluates cell by cell."""

import itertools
from functools import partial

from modeling_2dmse import parse_ladder
from run_scripts.shared import peer as peers
from run_scripts.shared.measure import in_turn, row, seconds
from trainer.evaluation import RetrievalData, StsData, evaluate_tasks, grid_sizes, main_scores

# Every cell costs sentence-transformers a pass over all texts; 36 passes take long enough on a part of the data.
PAIRS, QUERIES, DOCUMENTS = 300, 50, 200


def grid_cost(args, tasks: list[StsData | RetrievalData]) -> list[dict]:
    """Ratios of time: ours for all cells over ours for the largest, and theirs for all cells over ours."""
    peers.check_installed()
    tasks = [_part(task) for task in tasks]
    model, peer = peers.load_both(args)
    grid = grid_sizes(model.num_layers, [size.dim for size in parse_ladder(args.sizes)])
    options = {"max_length": args.max_length, "show_progress_bar": False, "batch_size": 32}
    ours = partial(evaluate_tasks, model, tasks, **options)
    check_same_scores(main_scores(ours(sizes=grid)), peer_scores(peer, tasks, grid[-1:]))
    sides = {
        "one cell": partial(seconds, partial(ours, sizes=grid[-1:])),
        "ours": partial(seconds, partial(ours, sizes=grid)),
        "theirs": partial(seconds, partial(peer_scores, peer, tasks, grid)),
    }
    taken = in_turn(args.runs, sides)
    more = {"cells": len(grid), "tasks": [task.name for task in tasks]}
    return [
        row("evaluate.one_pass", "<= 1.15", taken["ours"], taken["one cell"], **more),
        row("evaluate.grid", ">= 12", taken["theirs"], taken["ours"], **more),
    ]


def peer_scores(peer, tasks, sizes) -> dict[str, dict[str, float]]:
    """{task: {size: Spearman or nDCG@10}} by sentence-transformers' evaluators, with layers and dims cut."""
    scores: dict[str, dict[str, float]] = {task.name: {} for task in tasks}
    for num_layers, cells in itertools.groupby(sizes, key=lambda size: size.num_layers):
        cut = peers.cut_layers(peer, num_layers)
        for size in cells:
            for task in tasks:
                evaluator = _evaluator(task, size.dim)
                scores[task.name][str(size)] = evaluator(cut)[evaluator.primary_metric]
    return scores


def check_same_scores(ours: dict, theirs: dict) -> None:
    """ValueError if the scores of the two sides differ."""
    for task, scores in theirs.items():
        for size, score in scores.items():
            if abs(ours[task][size] - score) > 1e-4:
                raise ValueError(f"benchmark: {task} at {size} is {ours[task][size]:.4f} here and {score:.4f} there")


def _evaluator(task: StsData | RetrievalData, dim: int):
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )

    options = {"batch_size": 32, "truncate_dim": dim, "write_csv": False, "name": task.name}
    if isinstance(task, StsData):
        return EmbeddingSimilarityEvaluator(
            list(task.sentence1), list(task.sentence2), list(task.score), main_similarity="cosine", **options
        )
    relevant = {query: {key for key, gain in gains.items() if gain > 0} for query, gains in task.qrels.items()}
    return InformationRetrievalEvaluator(task.queries, task.corpus, relevant, main_score_function="cosine", **options)


def _part(task: StsData | RetrievalData) -> StsData | RetrievalData:
    """The first pairs, or the first queries with their relevant documents and some others."""
    if isinstance(task, StsData):
        return StsData(task.name, task.sentence1[:PAIRS], task.sentence2[:PAIRS], task.score[:PAIRS])
    queries = dict(itertools.islice(task.queries.items(), QUERIES))
    qrels = {query: task.qrels[query] for query in queries}
    wanted = dict.fromkeys(key for gains in qrels.values() for key in gains if key in task.corpus)
    others = (key for key in task.corpus if key not in wanted)
    keys = [*wanted, *itertools.islice(others, max(0, DOCUMENTS - len(wanted)))]
    return RetrievalData(task.name, queries, {key: task.corpus[key] for key in keys}, qrels)
