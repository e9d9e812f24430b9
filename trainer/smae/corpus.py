"""Texts for pre-training: packing them into blocks of equal length, and endless streams."""

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from modeling_2dmse.tokens import tokenize_words

from .masking import special_tokens_around


def pack(
    table: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset | IterableDataset:
    """Join texts, with the separator between them, and cut them into blocks.

    Args:
        table: texts in the column `text`.
        tokenizer: the model's tokenizer, a fast one.
        max_length: tokens per block, including the special tokens around it.

    Returns:
        a table of the same kind with columns `input_ids` and `words`, without the special tokens around a block.
    """
    before, after = special_tokens_around(tokenizer)
    room = max_length - len(before) - len(after)
    options = {"desc": "packing texts"} if isinstance(table, Dataset) else {}
    return table.map(
        _pack_texts,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "room": room, "joint": after[-1:]},
        **options,
    )


def endless(table: IterableDataset, seed: int, buffer_size: int = 10_000) -> IterableDataset:
    """Make a stream endless: it starts again when it ends.

    The stream is shuffled within a buffer, and its rows get a number, in the column `position`.

    After an interruption, the trainer finds its place in the stream by counting batches. It could not do so if the
    stream ended in between.

    Args:
        table: the stream.
        seed: seed of the shuffling.
        buffer_size: rows in the buffer.

    Returns:
        the endless stream.
    """
    return table.shuffle(seed=seed, buffer_size=buffer_size).repeat(None).map(_add_position, with_indices=True)


def _add_position(row: dict, position: int) -> dict:
    return {**row, "position": position}


def _pack_texts(batch: dict, tokenizer, room: int, joint: list[int]) -> dict:
    tokens, numbers = tokenize_words(tokenizer, batch["text"])
    # The joint comes before every text except the first.
    places = np.repeat(tokens.starts[1:-1], len(joint))
    ids = np.insert(tokens.ids, places, np.tile(joint, len(tokens) - 1))
    words = np.insert(numbers, places, -1)
    # The tokens at the end that do not fill a block become a shorter block: no text is lost.
    starts = range(0, len(ids), room)
    return {
        "input_ids": [ids[start : start + room] for start in starts],
        "words": [words[start : start + room] for start in starts],
    }
