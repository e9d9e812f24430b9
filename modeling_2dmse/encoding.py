"""Texts in, pooled states out: batches by length, a progress bar on long work, and compact output formats."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers.utils import logging

PRECISIONS = ("float32", "float16", "int8", "binary")
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
    # Tokenized in pieces, so that a long corpus is never held as Python lists of numbers.
    piece = max(batch_size, 64 * 256)
    total = -(-len(texts) // batch_size)
    bar = _progress_bar(total, show_progress_bar)
    output = None
    for start in range(0, len(texts), piece):
        rows = tokenize(tokenizer, texts[start : start + piece], max_length)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        for first in range(0, len(order), batch_size):
            index = order[first : first + batch_size]
            states = forward(pad(tokenizer, [rows[i] for i in index], device)).float().cpu()
            if output is None:
                output = torch.empty(states.shape[0], len(texts), states.shape[2])
            output[:, torch.from_numpy(index + start)] = states
            bar.update(1)
    bar.close()
    return output


def _progress_bar(batches: int, show: bool | None):
    # By default a bar needs long work and a terminal (tqdm's disable=None).
    disable = (True if batches < _BATCHES_FOR_A_BAR else None) if show is None else not show
    return logging.tqdm(total=batches, desc="Encoding", unit="batch", leave=False, disable=disable)


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
