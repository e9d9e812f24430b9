"""Ranking documents and scoring rankings, by the conventions of trec_eval."""

import math
from collections.abc import Sequence

import torch

Top = tuple[torch.Tensor, torch.Tensor]


def top_documents(queries: torch.Tensor, documents: torch.Tensor, k: int, first: int = 0) -> Top:
    """The k nearest documents of each query.

    Args:
        queries: (Q, dim), unit norm if cosines are compared.
        documents: (D, dim), as the queries.
        k: number of documents per query.
        first: number of the first document of `documents` in the whole corpus.

    Returns:
        scores and document numbers, (Q, min(k, D)), best first. Documents with equal scores keep their order, also
        if they compete for the k-th place.
    """
    scores = queries @ documents.T
    k = min(k, scores.shape[1])
    values, numbers = torch.topk(scores, k, dim=1)
    tied = torch.nonzero((scores >= values[:, -1:]).sum(dim=1) > k).flatten()
    for row in tied.tolist():
        values[row], numbers[row] = (part[:k] for part in torch.sort(scores[row], descending=True, stable=True))
    return _stable_top(values, numbers + first, k)


def merge_top(left: Top, right: Top, k: int) -> Top:
    """The k best documents of two rankings of different documents."""
    return _stable_top(torch.cat((left[0], right[0]), dim=1), torch.cat((left[1], right[1]), dim=1), k)


def _stable_top(values: torch.Tensor, numbers: torch.Tensor, k: int) -> Top:
    numbers, order = torch.sort(numbers, dim=1)
    values, order = torch.sort(values.gather(1, order), dim=1, descending=True, stable=True)
    return values[:, :k], numbers.gather(1, order)[:, :k]


def ranking_metrics(ranked: Sequence[Sequence[str]], gains: Sequence[dict[str, int]]) -> dict[str, float]:
    """nDCG@10 (linear gain, log2 discount, ideal ranking of all judged documents), MRR@10 and recall@100.

    Args:
        ranked: document ids of each query, best first, at least 100 if the corpus has as many.
        gains: the judged documents of each query; a document with a gain above 0 is relevant.

    Returns:
        `ndcg@10`, `mrr@10` and `recall@100`, means over queries.

    Examples:
        >>> ranking_metrics([["a", "b"]], [{"b": 1}])["mrr@10"]
        0.5
    """
    totals = {"ndcg@10": 0.0, "mrr@10": 0.0, "recall@100": 0.0}
    for documents, judged in zip(ranked, gains, strict=True):
        ideal = sorted(judged.values(), reverse=True)[:10]
        totals["ndcg@10"] += _dcg([judged.get(document, 0) for document in documents[:10]]) / _dcg(ideal)
        relevant = {document for document, gain in judged.items() if gain > 0}
        ranks = [rank for rank, document in enumerate(documents[:10], start=1) if document in relevant]
        totals["mrr@10"] += 1 / ranks[0] if ranks else 0.0
        totals["recall@100"] += len(relevant.intersection(documents[:100])) / len(relevant)
    return {metric: total / len(gains) for metric, total in totals.items()}


def _dcg(gains: Sequence[int]) -> float:
    return sum(max(gain, 0) / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
