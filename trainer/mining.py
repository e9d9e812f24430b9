"""Hard negatives: texts that a model finds near an anchor and that are not among its known positives."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from modeling_2dmse import Size, TwoDMSEModel
from retrieval.reading import read_title

from .beir import read_beir_folder
from .ranking import Top, merge_top, top_documents
from .selection import NegativeSelection
from .shared.tables import read_table

# Texts whose states, at the full hidden size, are in memory at once.
_ENCODE_CHUNK = 50_000
# The cosines in memory at once: a block of anchors by a chunk of documents, 17 MB.
_QUERY_CHUNK, _CORPUS_CHUNK = 256, 16_384
# Rows that choose their negatives at once: an anchor of the block may be in any number of rows.
_ROW_CHUNK = 4096
Pair = tuple[str, str]


@dataclass(frozen=True)
class MiningTask:
    """The rows that need negatives, as numbers of texts.

    Args:
        anchors: the A distinct anchors.
        texts: the D distinct documents of the corpus, and after them the positives that are not among them verbatim.
        num_documents: D.
        rows: (R, 2), the number of each row's anchor in `anchors` and of its positive in `texts`.
        excluded: for each anchor, the documents that must not be its negatives.
    """

    anchors: list[str]
    texts: list[str]
    num_documents: int
    rows: torch.Tensor
    excluded: list[list[int]]


def text_key(text: str) -> str:
    r"""A key that is the same for texts that differ only in case and white space.

    Examples:
        >>> text_key(" A  dog\n")
        'a dog'
    """
    return " ".join(text.casefold().split())


def prepare(pairs: Sequence[Pair], corpus: Iterable[str], known: Iterable[Pair] = ()) -> MiningTask:
    """Number the texts, and find the documents that must not be negatives of an anchor: its own text and its positives.

    Args:
        pairs: (anchor, positive) of each row.
        corpus: the candidates. Empty texts are left out, and the first of several texts with the same key is used.
        known: further (anchor, positive) pairs, which get no row.

    Returns:
        the task.
    """
    first: dict[str, str] = {}
    for text in corpus:
        first.setdefault(text_key(text), text)
    first.pop("", None)
    documents = {key: number for number, key in enumerate(first)}
    excluded: dict[str, set[int | None]] = defaultdict(set)
    for anchor, positive in itertools.chain(pairs, known):
        excluded[text_key(anchor)].update((documents.get(text_key(positive)), documents.get(text_key(anchor))))
    anchors = {text: number for number, text in enumerate(dict.fromkeys(anchor for anchor, _ in pairs))}
    every = itertools.chain(first.values(), (positive for _, positive in pairs))
    texts = {text: number for number, text in enumerate(dict.fromkeys(every))}
    return MiningTask(
        list(anchors),
        list(texts),
        len(documents),
        torch.tensor([(anchors[anchor], texts[positive]) for anchor, positive in pairs]),
        [sorted(number for number in excluded[text_key(anchor)] if number is not None) for anchor in anchors],
    )


def read_documents(path: str) -> list[str]:
    """The texts of a table with a column `text`; titles are added if it is a BEIR corpus (_id, title, text)."""
    table = read_table(path, "corpus_file")
    if "text" not in table.column_names:
        raise ValueError(f"corpus_file: {path} has no column text among {', '.join(table.column_names)}")
    feature = table.features["text"]
    kind = str(getattr(feature, "dtype", feature))
    if kind not in ("string", "large_string"):
        raise ValueError(f"corpus_file: column text of {path} holds {kind}, not texts")
    texts = [text or "" for text in table["text"][:]]
    if not {"_id", "title"} <= set(table.column_names):
        return texts
    titles = [read_title(value) or "" for value in table["title"][:]]
    return [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]


def read_beir(folder: str, split: str) -> tuple[list[Pair], list[str], list[Pair]]:
    """Read a BEIR folder.

    Args:
        folder: the folder.
        split: the split to mine negatives for.

    Returns:
        the (query, relevant document) pairs of the split, the corpus, and the pairs of all other splits.
    """
    others = sorted(path.stem for path in Path(folder, "qrels").glob("*.tsv") if path.stem != split)
    queries, corpus, qrels = read_beir_folder(folder, split, "beir_dir")
    # Texts, not ids: a query of this split may be in another split with another id.
    known = [pair for other in others for pair in _relevant_pairs(*read_beir_folder(folder, other, "beir_dir"))]
    return _relevant_pairs(queries, corpus, qrels), list(corpus.values()), known


def _relevant_pairs(queries: dict[str, str], corpus: dict[str, str], qrels: dict[str, dict[str, int]]) -> list[Pair]:
    pairs = (
        (queries[query], corpus.get(document, ""))
        for query, gains in qrels.items()
        for document, gain in gains.items()
        if gain > 0
    )
    return [(query, document) for query, document in pairs if query.strip() and document]


def embed(model: TwoDMSEModel, texts: Sequence[str], size: Size, prompt: str = "", **encode: Any) -> torch.Tensor:
    """Embeddings at one size. The hidden states of the whole corpus, which are much wider, are never in memory at once.

    Args:
        model: the model.
        texts: the texts.
        size: the size.
        prompt: text put in front of every text.
        **encode: `batch_size` and `max_length` of `TwoDMSEModel.encode`.

    Returns:
        (len(texts), dim), float32, of unit norm unless the model compares embeddings by dot product.
    """
    output = torch.empty(len(texts), size.dim)
    for start in range(0, len(texts), _ENCODE_CHUNK):
        part = texts[start : start + _ENCODE_CHUNK]
        output[start : start + len(part)] = torch.from_numpy(model.encode(part, *size, prompt=prompt, **encode))
    return output


def top_candidates(
    queries: torch.Tensor,
    documents: torch.Tensor,
    k: int,
    excluded: Sequence[Sequence[int]],
    query_chunk: int = _QUERY_CHUNK,
    corpus_chunk: int = _CORPUS_CHUNK,
) -> Iterator[Top]:
    """The k nearest documents of each query that are not excluded for it, one block of queries after another.

    Args:
        queries: (Q, dim), unit norm.
        documents: (D, dim), unit norm.
        k: number of documents per query.
        excluded: for each query, numbers of documents.
        query_chunk: queries per block.
        corpus_chunk: documents per chunk; at most query_chunk * corpus_chunk cosines are in memory at once.

    Yields:
        cosines and document numbers, (block, min(k, D)), best first, equal cosines in the order of the documents; the
        cosine is -inf if a query has fewer candidates.
    """
    steps = math.ceil(len(queries) / query_chunk) * math.ceil(len(documents) / corpus_chunk)
    hidden_bar = steps == 1 or None  # None: shown on a terminal
    with logging.tqdm(total=steps, desc="Searching", unit="block", leave=False, disable=hidden_bar) as bar:
        for start in range(0, len(queries), query_chunk):
            block = queries[start : start + query_chunk]
            pairs = [(row, number) for row, numbers in enumerate(excluded[start : start + len(block)])
                     for number in numbers]  # fmt: skip
            hidden = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
            top = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.long)
            for first in range(0, len(documents), corpus_chunk):
                found = _top_of_chunk(block, documents[first : first + corpus_chunk], k, hidden, first)
                top = merge_top(top, found, k)
                bar.update()
            yield top


def _top_of_chunk(queries: torch.Tensor, documents: torch.Tensor, k: int, hidden: torch.Tensor, first: int) -> Top:
    """At least the k nearest documents in one chunk of the corpus, with -inf for hidden (row, document) pairs.

    The search also returns as many more documents as are hidden in this chunk, so that k others remain.
    """
    rows, numbers = hidden[(hidden[:, 1] >= first) & (hidden[:, 1] < first + len(documents))].T
    mask = torch.zeros(len(queries), len(documents), dtype=torch.bool)
    mask[rows, numbers - first] = True
    scores, found = top_documents(queries, documents, k + int(rows.bincount(minlength=1).max()), first)
    return scores.masked_fill(mask.gather(1, found - first), -math.inf), found


def choose_negatives(
    scores: torch.Tensor, positives: torch.Tensor, selection: NegativeSelection, rng: np.random.Generator
) -> torch.Tensor:
    """Choose the negatives among the candidates of each row.

    Args:
        scores: (rows, K) cosines, best first, K at least num_negatives; -inf for missing candidates.
        positives: (rows,), the cosine of each row's positive.
        selection: the filters.
        rng: the generator of the random sampling.

    Returns:
        (rows, num_negatives) column numbers of `scores`, ascending; all -1 in rows where fewer candidates remain.

    Examples:
        >>> cosines = torch.tensor([[0.9, 0.7, 0.5, 0.3], [0.9, 0.7, 0.5, 0.3]])
        >>> selection = NegativeSelection(num_negatives=2, range_min=1, margin=0.1)
        >>> choose_negatives(cosines, torch.tensor([0.8, 0.4]), selection, np.random.default_rng(0))
        tensor([[ 1,  2],
                [-1, -1]])
    """
    rank = torch.arange(1, scores.shape[1] + 1)
    allowed = scores.isfinite() & (rank > selection.range_min) & (rank <= selection.range_max)
    allowed &= scores <= selection.highest_cosine(positives)[:, None]
    order = torch.from_numpy(rng.random(scores.shape)) if selection.sampling == "random" else rank.expand(scores.shape)
    order = order.double().masked_fill(~allowed, math.inf)
    chosen = order.argsort(dim=1)[:, : selection.num_negatives].sort(dim=1).values
    return chosen.masked_fill(allowed.sum(dim=1, keepdim=True) < selection.num_negatives, -1)


def mine(
    task: MiningTask,
    anchors: torch.Tensor,
    texts: torch.Tensor,
    selection: NegativeSelection,
    query_chunk: int = _QUERY_CHUNK,
    corpus_chunk: int = _CORPUS_CHUNK,
) -> torch.Tensor:
    """The negatives of every row; they do not depend on the chunk sizes.

    Args:
        task: the rows and texts.
        anchors: (A, dim), the embeddings of the task's anchors.
        texts: (T, dim), the embeddings of the task's texts.
        selection: the filters.
        query_chunk: see `top_candidates`.
        corpus_chunk: see `top_candidates`.

    Returns:
        (R, num_negatives) document numbers, best ranked first; all -1 in rows where fewer candidates remain.
    """
    rng = np.random.default_rng(selection.seed)
    chosen = torch.empty(len(task.rows), selection.num_negatives, dtype=torch.long)
    order = task.rows[:, 0].argsort(stable=True)
    owner = task.rows[order, 0].contiguous()
    first = 0
    blocks = top_candidates(
        anchors, texts[: task.num_documents], selection.range_max, task.excluded, query_chunk, corpus_chunk
    )
    for scores, numbers in blocks:
        start, end = torch.searchsorted(owner, torch.tensor([first, first + len(scores)])).tolist()
        for rows in order[start:end].split(_ROW_CHUNK):
            anchor, positive = task.rows[rows].T
            cosines = (anchors[anchor] * texts[positive]).sum(dim=1)
            columns = choose_negatives(scores[anchor - first], cosines, selection, rng)
            found = numbers[anchor - first].gather(1, columns.clamp(min=0))
            chosen[rows] = found.masked_fill(columns < 0, -1)
        first += len(scores)
    return chosen
