"""Texts in batches of similar length: argument checks, tokenization, padding, grouping, and a pass over many texts."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

# Texts that are tokenized at once.
_PIECE = 4096
# On a CPU, a batch with more tokens does not fit into the caches.
_CPU_TOKENS = 2048
# A progress bar appears from this many batches on; shorter work ends before anyone would read it.
_BATCHES_FOR_A_BAR = 20


def check_texts(texts: str | Iterable[str]) -> tuple[list[str], bool]:
    """The texts as a list, and whether a single string was given.

    Raises:
        ValueError: an item is not a string.
    """
    single = isinstance(texts, str)
    items = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise ValueError(f"texts: item {index} is a {type(text).__name__}; every text must be a string")
    return items, single


def check_batch_size(batch_size: int) -> None:
    """ValueError unless `batch_size` is a whole number from 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} is not allowed; use a whole number from 1")


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[dict]:
    """One dict of token lists per text, not padded."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)
    keys = [key for key in encoded if key in ("input_ids", "attention_mask", "token_type_ids")]
    return [{key: encoded[key][row] for key in keys} for row in range(len(texts))]


def pad(tokenizer: PreTrainedTokenizerBase, rows: list[dict], device=None) -> dict[str, torch.Tensor]:
    """Rows of tokens as (batch, longest) tensors, padded on the right whatever side the tokenizer is set to."""
    batch = tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")
    return {key: value.to(device) for key, value in batch.items()}


def row_lengths(mask: torch.Tensor) -> list[int]:
    """Columns up to the last real token of each row of a (batch, length) mask, at least 1; this waits for a GPU."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.to(torch.long) * columns).amax(dim=1).clamp(min=1).tolist()


def even_groups(lengths: Sequence[int], rows: int) -> list[tuple[np.ndarray, int]]:
    """Rows sorted by length, in groups of `rows` rows or one fewer.

    Returns:
        (rows, length of the longest) of each group.
    """
    order = np.argsort(lengths, kind="stable")
    groups = np.array_split(order, -(-len(order) // rows))
    return [(group, int(lengths[group[-1]])) for group in groups]


def tight_groups(lengths: Sequence[int], count: int) -> list[tuple[np.ndarray, int]]:
    """Rows sorted by length, in at most `count` groups, split where the fewest padding tokens remain.

    Returns:
        (rows, length of the longest) of each group.

    >>> [(rows.tolist(), longest) for rows, longest in tight_groups([9, 2, 3, 2], 2)]
    [([1, 3, 2], 3), ([0], 9)]
    """
    order = np.argsort(lengths, kind="stable")
    values, repeats = np.unique(lengths, return_counts=True)
    ends = np.concatenate([[0], repeats.cumsum()])
    # padded[i, j]: tokens of one group from the i-th distinct length to the (j-1)-th; cost[j]: of all rows before.
    padded = (ends[None, :] - ends[:, None]) * np.concatenate([[0], values])[None, :].astype(float)
    padded[np.tril_indices(len(ends))] = np.inf
    cost, cuts = np.concatenate([[0.0], np.full(len(values), np.inf)]), []
    for _ in range(min(count, len(values))):
        total = cost[:, None] + padded
        cuts.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    groups, end = [], len(values)
    for cut in reversed(cuts):
        groups.append((order[ends[cut[end]] : ends[end]], int(values[end - 1])))
        end = cut[end]
    return groups[::-1]


def back_in_order(groups: list[tuple[np.ndarray, int]]) -> torch.Tensor:
    """The permutation that restores the original order of the groups' rows, concatenated group by group."""
    return torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in groups])))


def pooled_states(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_size: int,
    device,
    show_progress_bar: bool | None,
) -> torch.Tensor:
    """Run `forward` over the texts, longest first, and put the rows back in the order of the texts.

    Args:
        forward: maps a padded batch on `device` to (exits, batch, hidden).
        tokenizer: of the model.
        texts: at least one.
        max_length: in tokens; longer texts are truncated.
        batch_size: texts per batch when they are the longest; see `token_batches`.
        device: where the batches go.
        show_progress_bar: None shows one for work of 20 batches or more, on a terminal.

    Returns:
        (exits, len(texts), hidden), float32, on the CPU.

    Raises:
        ValueError: there are no texts.
    """
    # Tokenized in pieces, so that a long corpus never exists as Python lists of numbers; the next piece is tokenized
    # while the model is busy with the current one.
    piece = max(batch_size, _PIECE)
    starts = range(0, len(texts), piece)
    bar = _progress_bar(len(texts), batch_size, show_progress_bar)
    output = None
    most = _CPU_TOKENS if torch.device(device).type == "cpu" else sys.maxsize
    with ThreadPoolExecutor(1) as tokenizing:
        waiting = [tokenizing.submit(tokenize, tokenizer, texts[s : s + piece], max_length) for s in starts[:1]]
        for start in starts:
            rows = waiting.pop().result()
            if start + piece < len(texts):
                following = texts[start + piece : start + 2 * piece]
                waiting.append(tokenizing.submit(tokenize, tokenizer, following, max_length))
            for index in token_batches([len(row["input_ids"]) for row in rows], batch_size, most):
                states = forward(pad(tokenizer, [rows[i] for i in index], device)).float().cpu()
                if output is None:
                    output = torch.empty(states.shape[0], len(texts), states.shape[2])
                output[:, torch.from_numpy(index + start)] = states
                bar.update(len(index))
    bar.close()
    if output is None:
        raise ValueError("texts: the list is empty; give at least one text")
    return output


def token_batches(lengths: Sequence[int], batch_size: int, most: int = sys.maxsize) -> Iterator[np.ndarray]:
    """Rows, longest first, in batches of equal token counts: shorter rows come in larger batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows of the first batch, which holds the longest; its tokens are the limit for every batch.
        most: a second limit on the tokens per batch; a batch has at least one row.

    >>> [rows.tolist() for rows in token_batches([2, 8, 4, 4, 1], 1)]
    [[1], [2, 3], [0, 4]]
    """
    order = np.argsort([-length for length in lengths], kind="stable")
    tokens, first = min(most, batch_size * lengths[order[0]]), 0
    while first < len(order):
        rows = order[first : first + max(1, tokens // max(1, lengths[order[first]]))]
        yield rows
        first += len(rows)


def _progress_bar(texts: int, batch_size: int, show: bool | None):
    # By default a bar needs long work and a terminal (tqdm's disable=None).
    disable = (True if texts < _BATCHES_FOR_A_BAR * batch_size else None) if show is None else not show
    return logging.tqdm(total=texts, desc="Encoding", unit="text", leave=False, disable=disable)
