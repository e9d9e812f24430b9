"""Texts in batches of similar length: argument checks, grouping, and a pass over many texts."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .tokens import Tokens, tokenize

# Texts that are tokenized at once.
_PIECE = 4096
# On a CPU, a batch with more tokens does not fit into the caches.
CPU_TOKENS = 2048
# The fewest and the most tokens per batch on a GPU.
_GPU_TOKENS = (8192, 131_072)
# A progress bar appears from this many texts on; shorter work ends before anyone would read it.
_TEXTS_FOR_A_BAR = 640


def check_texts(texts: str | Iterable[str] | None) -> tuple[list[str], bool]:
    """The texts as a list, and whether a single string was given.

    Raises:
        ValueError: an item is not a string, or there is neither a string nor a list.
    """
    single = isinstance(texts, str)
    try:
        if texts is None or isinstance(texts, (bytes, Mapping)) or hasattr(texts, "columns"):
            found = None  # going through a table of pandas would give the names of its columns
        else:
            found = iter([texts] if isinstance(texts, str) else texts)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"texts: a {type(texts).__name__} is not allowed; give a string or a list of strings")
    items = list(found)
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise ValueError(f"texts: item {index} is a {type(text).__name__}; every text must be a string")
    return items, single


def check_batch_size(batch_size: int) -> None:
    """ValueError unless `batch_size` is a whole number from 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} is not allowed; use a whole number from 1")


def check_words(largest: int, vocabulary: int | None) -> None:
    """ValueError if the largest token has no word embedding, which would end the process on a GPU."""
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"tokenizer: it has token {largest}, but the model has {vocabulary} word embeddings; after add_tokens, "
            "call resize_token_embeddings(len(tokenizer))"
        )


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
    forward: Callable[[dict], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_tokens: int,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    packs: Callable[[], bool] = lambda: False,
    show_progress_bar: bool | None = None,
    progress: Callable[[int], object] | None = None,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """Run `forward` over the texts, longest first, and put the rows back in the order of the texts.

    The next texts are tokenized while the model is busy with the current ones. Results stay on the device until a piece
    of some thousand texts is done, and are copied while the next piece runs.

    Args:
        forward: maps a batch on `device`, padded or packed, to (exits, texts of the batch, hidden).
        tokenizer: of the model.
        texts: at least one.
        max_length: in tokens; longer texts are truncated.
        batch_tokens: most tokens per batch.
        batch_size: most texts per batch when they are the longest; shorter texts come in larger batches.
        device: where the batches go.
        packs: whether batches may be packed rows instead of padded ones, asked when that would save something.
        show_progress_bar: None shows one for long work, on a terminal.
        progress: called after each batch with its number of texts.
        vocabulary: number of word embeddings of the model; default: not checked.

    Returns:
        (exits, len(texts), hidden), float32, on the CPU.

    Raises:
        ValueError: there are no texts, or a token has no word embedding.
    """
    if not texts:
        raise ValueError("texts: the list is empty; give at least one text")
    gathered: list[torch.Tensor] = []
    bar = _progress_bar(len(texts), show_progress_bar)
    output = _Output(len(texts))
    for start, tokens in _tokenized(tokenizer, texts, max_length):
        check_words(int(tokens.ids.max()), vocabulary)
        rows = []
        for index in token_batches(tokens.lengths, batch_size, batch_tokens):
            gathered.append(forward(_batch(tokens.take(index), packs, torch.device(device))).float())
            rows.append(index)
            bar.update(len(index))
            if progress is not None:
                progress(len(index))
        output.add(start, np.concatenate(rows), torch.cat(gathered, dim=1))
        gathered.clear()
    bar.close()
    return output.finish()


def _batch(tokens: Tokens, packs: Callable[[], bool], device: torch.device) -> dict:
    """The inputs of a model. On a CPU, packing pays by the padding it saves, and texts of one length have none."""
    even = device.type == "cpu" and tokens.lengths.min() == tokens.lengths.max()
    return tokens.packed(device) if not even and packs() else tokens.padded(device)


def _tokenized(tokenizer, texts: Sequence[str], max_length: int) -> Iterator[tuple[int, Tokens]]:
    """(first text, tokens) of each piece of the texts; a thread is always one piece ahead."""
    starts = range(0, len(texts), _PIECE)
    with ThreadPoolExecutor(1) as pool:
        work = lambda start: pool.submit(tokenize, tokenizer, texts[start : start + _PIECE], max_length)
        following = work(0)
        for start in starts:
            tokens = following.result()
            if start + _PIECE < len(texts):
                following = work(start + _PIECE)
            yield start, tokens


class _Output:
    """(exits, texts, hidden) on the CPU, filled piece by piece; a piece is copied when the next one has started."""

    def __init__(self, texts: int):
        self.texts = texts
        self.whole: torch.Tensor | None = None
        self.waiting: tuple[int, np.ndarray, torch.Tensor] | None = None

    def add(self, start: int, rows: np.ndarray, states: torch.Tensor) -> None:
        self._copy()
        self.waiting = start, rows, states

    def finish(self) -> torch.Tensor:
        self._copy()
        assert self.whole is not None
        return self.whole

    def _copy(self) -> None:
        if self.waiting is None:
            return
        start, rows, states = self.waiting
        if self.whole is None:
            self.whole = torch.empty(states.shape[0], self.texts, states.shape[2])
        self.whole[:, torch.from_numpy(rows + start)] = states.cpu()


def token_batches(
    lengths: Sequence[int] | np.ndarray, batch_size: int | None, most: int = sys.maxsize
) -> Iterator[np.ndarray]:
    """Rows, longest first, in batches of equal token counts: shorter rows come in larger batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows of the first batch, which holds the longest; its tokens are the limit for every batch.
        most: a second limit on the tokens per batch; a batch has at least one row.

    >>> [rows.tolist() for rows in token_batches([2, 8, 4, 4, 1], 1)]
    [[1], [2, 3], [0, 4]]
    """
    counts = np.asarray(lengths)
    order = np.argsort(-counts, kind="stable")
    tokens, first = most if batch_size is None else min(most, batch_size * int(counts[order[0]])), 0
    while first < len(order):
        rows = order[first : first + max(1, tokens // max(1, int(counts[order[first]])))]
        yield rows
        first += len(rows)


def default_batch_tokens(device: torch.device, hidden_size: int, intermediate_size: int) -> int:
    """Tokens per batch that suit a device: what stays in a CPU's caches, or what an eighth of a GPU's free memory
    holds, between 8,192 and 131,072."""
    if device.type == "cpu":
        return CPU_TOKENS
    if device.type != "cuda":
        return _GPU_TOKENS[0]
    # A layer's largest states in float32: the two sides of the activation, and some of the model's width.
    per_token = 4 * (2 * intermediate_size + 8 * hidden_size)
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 8 // per_token, _GPU_TOKENS[0]), _GPU_TOKENS[1]))


def _progress_bar(texts: int, show: bool | None):
    # By default a bar needs long work and a terminal (tqdm's disable=None).
    disable = (True if texts < _TEXTS_FOR_A_BAR else None) if show is None else not show
    return logging.tqdm(total=texts, desc="Encoding", unit="text", leave=False, disable=disable)
