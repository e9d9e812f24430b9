"""Texts in, embeddings out: batches by length, a progress bar on long work, and compact output formats."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from .backbone import count_positions
from .pooling import cut_and_normalize

PRECISIONS = ("float32", "float16", "int8", "binary")
# Texts that are tokenized at a time.
_PIECE = 4096
# On a CPU, a batch of more tokens falls out of its caches.
_CPU_TOKENS = 2048
# A bar appears once there are this many batches; shorter work ends before a person would read it.
_BATCHES_FOR_A_BAR = 20


def check_texts(texts) -> tuple[list[str], bool]:
    """The texts as a list, and whether a single string was given; ValueError for anything that is not a string."""
    single = isinstance(texts, str)
    texts = [texts] if single else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts: item {index} is a {type(text).__name__}; every text must be a string")
    return texts, single


def check_batch_size(batch_size) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} is not allowed; use a whole number from 1")


def tokenize(tokenizer, texts: Sequence[str], max_length: int) -> list[dict]:
    """One dict of token lists a text, not padded."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)
    keys = [key for key in encoded if key in ("input_ids", "attention_mask", "token_type_ids")]
    return [{key: encoded[key][row] for key in keys} for row in range(len(texts))]


def pad(tokenizer, rows: list[dict], device=None) -> dict[str, torch.Tensor]:
    """Rows of tokens as (batch, longest) tensors, padded on the right whatever the tokenizer's own side is."""
    batch = tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")
    return {key: value.to(device) for key, value in batch.items()}


def row_lengths(mask: torch.Tensor) -> list[int]:
    """Columns up to the last real token of each row of a (batch, length) mask, at least 1; a GPU is waited for."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.to(torch.long) * columns).amax(dim=1).clamp(min=1).tolist()


def even_groups(lengths: Sequence[int], rows: int) -> list[tuple[np.ndarray, int]]:
    """Rows sorted by length, `rows` or one fewer to a group: (rows, longest) of each."""
    order = np.argsort(lengths, kind="stable")
    groups = np.array_split(order, -(-len(order) // rows))
    return [(group, int(lengths[group[-1]])) for group in groups]


def tight_groups(lengths: Sequence[int], count: int) -> list[tuple[np.ndarray, int]]:
    """Rows sorted by length, in at most `count` groups, cut where the fewest tokens of padding are left.

    Returns:
        (rows, longest) of each group.

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
    """The permutation that puts the groups' rows, one group behind the other, back in order."""
    return torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in groups])))


def pooled_states(
    forward: Callable[[dict], torch.Tensor],
    tokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int,
    device,
    show_progress_bar: bool | None,
) -> torch.Tensor:
    """Run `forward` over the texts, longest first, and put the rows back in the texts' order.

    Args:
        forward: from a padded batch on `device` to (exits, batch, hidden).

    Returns:
        (exits, len(texts), hidden), float32, on the CPU.
    """
    # Tokenized in pieces, so that a long corpus is never held as Python lists of numbers; the next piece while the
    # model is busy with this one.
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
    return output


def token_batches(lengths: Sequence[int], batch_size: int, most: int = sys.maxsize) -> Iterator[np.ndarray]:
    """Rows, longest first, in batches of as many tokens as `batch_size` of the longest rows have, and of `most`.

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


def quantize(embeddings: torch.Tensor, precision: str) -> torch.Tensor:
    """Unit vectors in a compact format.

    Args:
        embeddings: (rows, dim), float32, unit norm.
        precision: `float32`, `float16`, `int8` (four standard deviations of a random unit vector, 4 / sqrt(dim),
            become 127, and larger values are clipped: one scale for all texts, so that dot products of vectors
            from different calls compare) or `binary` (one bit a dimension, set where the value is above 0, eight
            to a byte, first dimension in the highest bit).

    Returns:
        (rows, dim), or (rows, ceil(dim / 8)) in uint8 for `binary`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision == "float16":
        return embeddings.half()
    if precision == "int8":
        scale = 127 * embeddings.shape[-1] ** 0.5 / 4
        return (embeddings * scale).round().clamp(-127, 127).to(torch.int8)
    if precision == "binary":
        return torch.from_numpy(np.packbits((embeddings > 0).cpu().numpy(), axis=-1))
    return embeddings


def check_between(name: str, value, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise ValueError(f"{name}: {value!r} is not allowed; this model has 1 to {highest}")


class EncodeMixin:
    """`encode` and what it needs, for a model with `config`, `backbone`, `num_layers` and `truncate`'s checks."""

    @property
    def tokenizer(self):
        """The tokenizer of the folder or repository that the model was loaded from."""
        if self._tokenizer is None:
            if not self.config.name_or_path:
                raise ValueError("tokenizer: this model was not loaded from a folder; set model.tokenizer first")
            self.tokenizer = AutoTokenizer.from_pretrained(self.config.name_or_path, **self._hub_kwargs)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # Llama's has none; padding is masked whatever it is
        self._tokenizer = tokenizer

    @property
    def max_length(self) -> int:
        """Longest input in tokens: the smaller of what the tokenizer and the positions of the backbone allow."""
        return min(self.tokenizer.model_max_length, count_positions(self.backbone))

    def encode(
        self,
        texts: str | Sequence[str],
        num_layers: int | None = None,
        dim: int | None = None,
        batch_size: int = 32,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
        precision: str = "float32",
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | torch.Tensor:
        """
        Embed texts at one size.

        Args:
            texts: a string, or a list of strings.
            num_layers: layers to run, 1 to N; the model's own number when left out.
            dim: dimensions to keep, 1 to the hidden size; the model's own number when left out.
            batch_size: texts a batch where they are the longest; shorter ones share a batch of as many tokens
                (on a CPU, of at most 2,048, which are faster there).
            prompt: text put in front of every text; or `prompt_name`, one of the config's prompts.
            max_length: in tokens; longer texts are cut.
            precision: `float32`, `float16`, `int8` or `binary`, see `encoding.quantize`.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: by default on work of 20 batches and more.

        Returns:
            (len(texts), dim) unit vectors in the texts' order, or (dim,) for a single string.
        """
        dim = self.config.dim if dim is None else self._check_dim(dim)
        layers = [self.num_layers if num_layers is None else num_layers]
        check_batch_size(batch_size)
        texts, single = check_texts(texts)
        states = self.encode_states(
            texts, layers, batch_size, self.find_prompt(prompt, prompt_name), max_length, show_progress_bar
        )
        embeddings = quantize(cut_and_normalize(states[0], dim), precision)
        embeddings = embeddings[0] if single else embeddings
        return embeddings.to(self.device) if convert_to_tensor else embeddings.numpy()

    def encode_states(
        self,
        texts: Sequence[str],
        layers: Sequence[int] | None = None,
        batch_size: int = 32,
        prompt: str = "",
        max_length: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> torch.Tensor:
        """
        Pooled states of texts at several exits, each text read once; every size is a slice of them.

        Args:
            layers: exits, ascending; all layers when left out.

        Returns:
            (len(layers), len(texts), hidden), float32, on the CPU, neither cut nor normalised.
        """
        layers = self._check_layers(range(1, self.num_layers + 1) if layers is None else layers)
        if not texts:
            return torch.empty(len(layers), 0, self.config.hidden_size)
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                return pooled_states(
                    lambda batch: self(**batch, layers=layers).layer_embeddings,
                    self.tokenizer,
                    [prompt + text for text in texts] if prompt else texts,
                    min(max_length or self.max_length, self.max_length),
                    batch_size,
                    self.device,
                    show_progress_bar,
                )
        finally:
            self.train(training)

    def find_prompt(self, prompt: str | None = None, name: str | None = None) -> str:
        """The text to put in front: `prompt`, the one of that name in the config, its default one, or none."""
        if prompt is not None:
            return prompt
        name = name if name is not None else self.config.default_prompt_name
        if name is None:
            return ""
        if name not in self.config.prompts:
            known = ", ".join(sorted(self.config.prompts)) or "none is set"
            raise ValueError(f"prompt_name: {name!r} is unknown; this model's prompts: {known}")
        return self.config.prompts[name]
