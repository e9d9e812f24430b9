"""Evaluation at every size from one encoding pass: STS (Spearman, Pearson) and retrieval (nDCG, MRR, recall)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.encoding import to_embeddings

from .beir import read_beir_folder
from .data import check_table, text_columns
from .ranking import Top, merge_top, ranking_metrics, top_documents
from .shared.tables import read_table

# Documents whose states are in memory at once; a longer corpus is ranked in several chunks.
_CORPUS_CHUNK = 50_000


@dataclass(frozen=True)
class StsData:
    """Sentence pairs with scores.

    Args:
        name: name of the task.
        sentence1: the first sentence of each pair.
        sentence2: the second sentence of each pair.
        score: the similarity of each pair, on any scale.
    """

    name: str
    sentence1: Sequence[str]
    sentence2: Sequence[str]
    score: Sequence[float]


@dataclass(frozen=True)
class RetrievalData:
    """A search task.

    Args:
        name: name of the task.
        queries: text of each query, by its id.
        corpus: text of each document, by its id.
        qrels: the judgements; `qrels[query_id][document_id]` is the gain.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]


def correlations(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """`spearman` and `pearson` of two (n,) arrays; 0 if one of them is constant."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    spearman, pearson = spearmanr(predictions, references), pearsonr(predictions, references)
    return {"spearman": float(spearman.statistic), "pearson": float(pearson.statistic)}


def load_sts(path: str) -> StsData:
    """Read an STS task from a table with columns (sentence1, sentence2, score)."""
    table = check_table(read_table(path, "sts_files"), "sts_files")
    if "score" not in table.column_names:
        raise ValueError(f"sts_files: {path} needs the columns (sentence1, sentence2, score)")
    check_varied(table, f"sts_files: {path}")
    name = os.path.basename(path).split(".")[0]
    return StsData(name, table["sentence1"][:], table["sentence2"][:], table["score"][:])


def check_varied(table: datasets.Dataset, place: str, hint: str = "") -> None:
    """ValueError, which starts with `place`, if no correlation can be measured: all scores or pairs are equal."""
    scores, rows = table["score"][:], len(table)
    if len(set(scores)) < 2:
        what = "one row" if rows == 1 else f"{rows} rows that all have the score {scores[0]:g}"
        raise ValueError(f"{place} has {what}; a correlation needs different scores{hint}")
    pairs = set(zip(table["sentence1"][:], table["sentence2"][:], strict=True))
    if all(first == second for first, second in pairs) or len(pairs) < 2:
        what = "are of the same two texts" if len(pairs) < 2 else "have the same text twice"
        raise ValueError(f"{place} has {rows} rows that all {what}; a correlation needs different similarities{hint}")


def name_apart(
    tasks: Sequence[StsData | RetrievalData], paths: Sequence[str], taken: Sequence[str] = ()
) -> list[StsData | RetrievalData]:
    """The tasks of some paths, with folders or file endings added to names that several of them have, or that are
    `taken` by tasks without a path.

    Raises:
        ValueError: a path is given twice.

    >>> pair = [StsData("sts", [], [], []), StsData("sts", [], [], [])]
    >>> [task.name for task in name_apart(pair, ["a/sts.csv", "b/sts.csv"])]
    ['a/sts.csv', 'b/sts.csv']
    """
    places = [os.path.realpath(path).split(os.sep) for path in paths]
    twice = next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"sts_files, beir_dirs: {twice} is named twice")
    named: list[StsData | RetrievalData] = []
    plain = [task.name for task in tasks]
    for task, place in zip(tasks, places, strict=True):
        ends = ("/".join(place[-depth:]) for depth in range(1, len(place) + 1))
        alone = next(
            end for end in ends if end not in taken and sum("/".join(other).endswith(end) for other in places) == 1
        )
        named.append(task if [*plain, *taken].count(task.name) == 1 else replace(task, name=alone))
    return named


def load_beir(folder: str, split: str = "test", argument: str = "beir_dirs") -> RetrievalData:
    """Read a folder in BEIR layout, see `beir.read_beir_folder`.

    Raises:
        ValueError: no query has a relevant document, or none of these documents is in the corpus.
    """
    queries, corpus, qrels = read_beir_folder(folder, split, argument)
    if not queries:
        raise ValueError(f"{argument}: {folder} has no query with a relevant document in its split {split}")
    if not any(name in corpus and gain > 0 for gains in qrels.values() for name, gain in gains.items()):
        raise ValueError(f"{argument}: no relevant document of the split {split} is in the corpus of {folder}")
    return RetrievalData(os.path.basename(os.path.normpath(folder)), queries, corpus, qrels)


def retrieval_from_pairs(name: str, table: datasets.Dataset) -> RetrievalData:
    """Make a search task from rows (anchor, positive[, negative ...]).

    Each distinct anchor is a query, each distinct text of the other columns is a document, and the positives of an
    anchor are its relevant documents.
    """
    documents = list(dict.fromkeys(text for column in text_columns(table)[1:] for text in table[column]))
    number = {text: f"d{index}" for index, text in enumerate(documents)}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for anchor, positive in zip(table["anchor"], table["positive"], strict=True):
        query = queries.setdefault(anchor, f"q{len(queries)}")
        qrels.setdefault(query, {})[number[positive]] = 1
    return RetrievalData(
        name, {query: text for text, query in queries.items()}, {number[t]: t for t in documents}, qrels
    )


def task_from_table(name: str, table: datasets.Dataset) -> StsData | RetrievalData:
    """Make an evaluation task from a checked table: STS if it has scores, retrieval otherwise."""
    if "score" in table.column_names:
        return StsData(name, table["sentence1"][:], table["sentence2"][:], table["score"][:])
    return retrieval_from_pairs(name, table)


def evaluate_sts(model: TwoDMSEModel, data: StsData, sizes: Sequence[Size], **encode: Any) -> dict[str, Any]:
    """Spearman and Pearson correlation of the similarities with the scores, at every size.

    The similarities are cosines or dot products (`model.config.similarity`). No prompt is used.

    Args:
        model: the model.
        data: the task.
        sizes: the sizes to evaluate, all from one encoding pass.
        **encode: `batch_size`, `max_length` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Returns:
        `{"n": pairs, "spearman": {"1x32": ...}, "pearson": {"1x32": ...}}`.
    """
    texts = list(dict.fromkeys([*data.sentence1, *data.sentence2]))
    row = {text: index for index, text in enumerate(texts)}
    left = torch.tensor([row[text] for text in data.sentence1])
    right = torch.tensor([row[text] for text in data.sentence2])
    gold = np.asarray(data.score, dtype=np.float64)
    states = _states(model, texts, sizes, **encode)
    result: dict[str, Any] = {"n": len(gold), "spearman": {}, "pearson": {}}
    for size in sizes:
        embeddings = to_embeddings(states[size.num_layers], size.dim, model.config.similarity)
        similarity = (embeddings[left] * embeddings[right]).sum(dim=1)
        for metric, value in correlations(similarity.double().numpy(), gold).items():
            result[metric][str(size)] = value
    return result


def evaluate_retrieval(
    model: TwoDMSEModel,
    data: RetrievalData,
    sizes: Sequence[Size],
    cross_sizes: bool = False,
    max_query_length: int | None = None,
    **encode: Any,
) -> dict[str, Any]:
    """nDCG@10, MRR@10 and recall@100 at every size, computed as in trec_eval (see `trainer.ranking`).

    The model's prompts `query` and `document`, if it has any, are put before the queries and the documents.

    Args:
        model: the model.
        data: the task.
        sizes: the sizes to evaluate, all from one encoding pass.
        cross_sizes: also search with queries of each size among documents of each other size.
        max_query_length: longest query in tokens; by default `max_length`.
        **encode: `batch_size`, `max_length` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Returns:
        `{"n_queries": ..., "ndcg@10": {"1x32": ...}, "mrr@10": {...}, "recall@100": {...}}`. With `cross_sizes`, also
        `"cross_ndcg@10": {"1x32": {"6x384": ...}}`, for queries at the first size and documents at the second, with
        the smaller of the two dims.
    """
    cells = [(queries, documents) for queries in sizes for documents in sizes if cross_sizes or queries == documents]
    metrics = _judge(model, data, cells, max_query_length, **encode)
    result: dict[str, Any] = {"n_queries": len(data.queries), "ndcg@10": {}, "mrr@10": {}, "recall@100": {}}
    for size in sizes:
        for metric, value in metrics[size, size].items():
            result[metric][str(size)] = value
    if cross_sizes:
        result["cross_ndcg@10"] = {str(q): {str(d): metrics[q, d]["ndcg@10"] for d in sizes} for q in sizes}
    return result


def _judge(
    model: TwoDMSEModel,
    data: RetrievalData,
    cells: Sequence[tuple[Size, Size]],
    max_query_length: int | None,
    **encode,
) -> dict[tuple[Size, Size], dict[str, float]]:
    """The metrics of each cell, a size of the queries and a size of the documents, from one pass over the texts."""
    layers = [size for cell in cells for size in cell]
    query_ids = list(data.queries)
    # With equal scores, trec_eval ranks the larger document id first; a stable ranking in this order does the same.
    document_ids = sorted(data.corpus, reverse=True)
    prompts, similarity = model.config.prompts, model.config.similarity
    options = encode if max_query_length is None else encode | {"max_length": max_query_length}
    texts = [data.queries[query] for query in query_ids]
    queries = _states(model, texts, layers, prompt=prompts.get("query", ""), **options)
    top: dict[tuple[Size, Size], Top] = {}
    for start in range(0, len(document_ids), _CORPUS_CHUNK):
        chunk = document_ids[start : start + _CORPUS_CHUNK]
        texts = [data.corpus[document] for document in chunk]
        documents = _states(model, texts, layers, prompt=prompts.get("document", ""), **encode)
        for cell in cells:
            (query, document), dim = cell, min(size.dim for size in cell)
            found = top_documents(
                to_embeddings(queries[query.num_layers], dim, similarity),
                to_embeddings(documents[document.num_layers], dim, similarity),
                k=100,
                first=start,
            )
            top[cell] = merge_top(top[cell], found, k=100) if cell in top else found
    gains = [data.qrels[query] for query in query_ids]
    return {
        cell: ranking_metrics([[document_ids[i] for i in row] for row in top[cell][1].tolist()], gains)
        for cell in cells
    }


def evaluate_tasks(
    model: TwoDMSEModel,
    tasks: Sequence[StsData | RetrievalData],
    sizes: Sequence[Size],
    cross_sizes: bool = False,
    max_query_length: int | None = None,
    **encode: Any,
) -> dict[str, Any]:
    """Evaluate all tasks at all sizes.

    Args:
        model: the model.
        tasks: the tasks.
        sizes: the sizes.
        cross_sizes: see `evaluate_retrieval`.
        max_query_length: see `evaluate_retrieval`.
        **encode: see `evaluate_sts`.

    Returns:
        the contents of `results.json`: `{"sts": {name: ...}, "retrieval": {name: ...}}`.

    Raises:
        ValueError: two tasks have the same name, or one has nothing to score.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: two of {', '.join(names)} have the same name; name them apart with `name_apart`")
    for task in tasks:
        if not (task.score if isinstance(task, StsData) else task.queries and task.corpus):
            raise ValueError(f"tasks: {task.name} has nothing to score")
    results: dict = {}
    for task in tasks:
        if isinstance(task, StsData):
            results.setdefault("sts", {})[task.name] = evaluate_sts(model, task, sizes, **encode)
        else:
            results.setdefault("retrieval", {})[task.name] = evaluate_retrieval(
                model, task, sizes, cross_sizes, max_query_length, **encode
            )
    return results


def main_scores(results: dict) -> dict[str, dict[str, float]]:
    """The main metric of every task: `{task: {size: Spearman, nDCG@10 or MTEB's main score}}`."""
    sts = {name: task["spearman"] for name, task in results.get("sts", {}).items()}
    retrieval = {name: task["ndcg@10"] for name, task in results.get("retrieval", {}).items()}
    return sts | retrieval | {name: task["scores"] for name, task in results.get("mteb", {}).items()}


def metric_name(task: str, results: dict) -> str:
    """The name of a task's main metric."""
    if task in results.get("mteb", {}):
        return results["mteb"][task]["metric"]
    return "Spearman" if task in results.get("sts", {}) else "nDCG@10"


def mean_scores(results: dict) -> dict[str, float]:
    """The main metric of every size, averaged over the tasks."""
    scores = list(main_scores(results).values())
    return {size: float(np.mean([task[size] for task in scores])) for size in scores[0]}


def best_for_cost(results: dict, ladder: Sequence[Size]) -> Size:
    """The size that a user is shown first: the cheapest one of the ladder with at least 95 % of its best score.

    The score is the mean over the tasks of the main metric; without any, it is the size in the middle of the ladder.

    Args:
        results: of `evaluate_tasks`, with every size of the ladder; may have no tasks.
        ladder: the sizes, small to large.

    >>> results = {"sts": {"a": {"spearman": {"1x8": 0.7, "2x8": 0.77, "4x8": 0.8}}}}
    >>> best_for_cost(results, [Size(1, 8), Size(2, 8), Size(4, 8)])
    Size(num_layers=2, dim=8)
    """
    if not main_scores(results):
        return ladder[len(ladder) // 2]
    scores = mean_scores(results)
    best = max(scores[str(size)] for size in ladder)
    return next(size for size in ladder if scores[str(size)] >= best - 0.05 * abs(best))


def grid_sizes(num_layers: int, dims: Sequence[int]) -> list[Size]:
    """Every number of layers with every dim; the dims of one depth come together."""
    return [Size(n, dim) for n in range(1, num_layers + 1) for dim in sorted(set(dims))]


def _states(model: TwoDMSEModel, texts: list[str], sizes: Sequence[Size], **encode) -> dict[int, torch.Tensor]:
    layers = sorted({size.num_layers for size in sizes})
    return dict(zip(layers, model.encode_states(texts, layers, **encode), strict=True))
