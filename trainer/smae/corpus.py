"""Plain texts: reading them, and for pre-training leaving out what is too short, and packing them into equal blocks."""

import itertools
import os
import re
from collections.abc import Iterable

import datasets
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..shared.tables import FORMATS, read_table
from .masking import special_tokens_around, tokenize_words

MIN_WORDS = 3


def read_corpus(path: str, text_column: str, streaming: bool = False, argument: str = "train_file"):
    """
    Read texts: a .txt file (a paragraph a line), or csv, tsv, jsonl, parquet with a text column, each also .gz.

    Returns:
        a `Dataset`, or an `IterableDataset` where `streaming`, with the column `text`; ValueError naming the argument
        for a file without such texts.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{argument}: {path} is not a file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{argument}: {path} is empty")
    suffix = os.path.splitext(re.sub(r"\.gz$", "", path.lower()))[1]
    if suffix != ".txt":
        if suffix not in FORMATS:
            raise ValueError(f"{argument}: {path} has an unknown format; use one of .txt, {', '.join(FORMATS)}")
        if not streaming:
            return check_corpus(read_table(path, argument), text_column, argument)
        builder, options = FORMATS[suffix]
    else:
        builder, options = "text", {}
        if text_column != "text":
            raise ValueError(f"text_column: {text_column} does not stand in {path}: a .txt file holds plain lines")
    table = datasets.load_dataset(builder, data_files=path, split="train", streaming=streaming, **options)
    return check_corpus(table, text_column, argument)


def check_corpus(table: Dataset | IterableDataset, text_column: str, argument: str = "train_file"):
    """The texts of a table that have at least three words; ValueError where there are none."""
    names = table.column_names or list(next(iter(table), {}))
    if text_column not in names:
        raise ValueError(f"{argument}: there is no column {text_column} (--text_column) among {', '.join(names)}")
    table = table.select_columns([text_column])
    if text_column != "text":
        table = table.rename_column(text_column, "text")
    table = table.filter(_long_enough)
    if next(iter(table), None) is None:
        raise ValueError(f"{argument}: no text has {MIN_WORDS} words or more")
    return table


def pack(table: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_length: int):
    """
    Texts joined (with the separator between them) and cut into blocks of `max_length` tokens, special ones included.

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
    """A stream shuffled within a buffer, from the start again when it ends, each row with its `position`.

    The trainer counts the batches it has taken and finds its place again after an interruption, which it could not
    if the stream ended in between.
    """
    return table.shuffle(seed=seed, buffer_size=buffer_size).repeat(None).map(_add_position, with_indices=True)


def _add_position(row: dict, position: int) -> dict:
    return {**row, "position": position}


def _long_enough(row: dict) -> bool:
    text = row["text"]
    return isinstance(text, str) and len(text.split(maxsplit=MIN_WORDS)) >= MIN_WORDS


def _pack_texts(batch: dict, tokenizer, room: int, joint: list[int]) -> dict:
    rows = tokenize_words(tokenizer, batch["text"])
    ids = list(_joined([row["input_ids"] for row in rows], joint))
    words = list(_joined([row["words"] for row in rows], [-1] * len(joint)))
    # The end of a batch of texts that fills no block is a shorter block of its own: no text is lost.
    starts = range(0, len(ids), room)
    return {
        "input_ids": [ids[start : start + room] for start in starts],
        "words": [words[start : start + room] for start in starts],
    }


def _joined(parts: list[list[int]], joint: list[int]) -> Iterable[int]:
    pairs = zip(parts, [*([joint] * (len(parts) - 1)), []], strict=True)
    return itertools.chain.from_iterable(itertools.chain(part, end) for part, end in pairs)
