"""Labeled texts and images: reading them, their labels, batches, and the rows that a classifier has seen."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from modeling_2dmse.tokens import tokenize

from ..shared.pictures import decode_when_read
from ..shared.tables import check_texts, read_table

# The file in a classifier's folder with the rows that it was trained on and its cascade was fitted on: 64-bit hashes.
SEEN_FILE = "classify_rows.npz"
_BITS = 16  # hexadecimal digits


def read_examples(path: str, argument: str, text_columns: Sequence[str], label_column: str) -> Dataset:
    """Read labeled texts or images.

    Args:
        path: a csv, tsv, jsonl or parquet file, each also .gz; or a folder in `imagefolder` layout, CLASS/FILE.
        argument: the name that errors give to the file.
        text_columns: one text column, or two for pairs.
        label_column: the column with class names or numbers.

    Returns:
        a table with columns `row_key` (a hash of the first text, or of the image), the text columns or `image`, and
        `label` (a string).

    Raises:
        ValueError: the data cannot be read, a column is missing, or a value is not allowed.
    """
    if os.path.isdir(path):
        return _read_images(path, argument)
    table = read_table(path, argument)
    for name in (*text_columns, label_column):
        if name not in table.column_names:
            raise ValueError(
                f"{argument}: {path} has no column {name}; its columns are {', '.join(table.column_names)}"
            )
    for name in text_columns:
        check_texts(table, name, argument, optional=False)
    labels = [_label(value, row, argument) for row, value in enumerate(table[label_column], start=1)]
    columns = {name: table[name][:] for name in text_columns}
    keys = [_hash(text.encode()) for text in columns[text_columns[0]]]
    return Dataset.from_dict({"row_key": keys, **columns, "label": labels})


def _label(value, row: int, argument: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{argument}: the label in row {row} is {value!r}; use class names or whole numbers")
    return str(value)


def _read_images(folder: str, argument: str) -> Dataset:
    try:
        table = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{argument}: {folder} cannot be read as CLASS/IMAGE files: {reason}") from error
    if not isinstance(table.features.get("label"), ClassLabel):
        raise ValueError(f"{argument}: {folder} is not in imagefolder layout; use one folder of images per class")
    names = table.features["label"].names
    files = table.cast_column("image", datasets.Image(decode=False))["image"]
    keys = [_hash(file["bytes"] or Path(file["path"]).read_bytes()) for file in files]
    labels = [names[index] for index in table["label"]]
    table = table.select_columns("image").add_column("row_key", keys).add_column("label", labels)
    return decode_when_read(table.select_columns(["row_key", "image", "label"]), argument)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_BITS]


def label_names(table: Dataset) -> list[str]:
    """The classes of a table, numbers sorted by value and names alphabetically; ValueError for fewer than two."""
    names = sorted(set(table["label"]), key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    if len(names) < 2:
        raise ValueError(f"train_file: all rows have the label {names[0]}; a classifier needs at least 2 classes")
    return names


def number_labels(table: Dataset, label2id: dict[str, int], argument: str) -> Dataset:
    """The table with the model's class numbers as labels; ValueError for a class that the model does not know."""
    unknown = sorted(set(table["label"]) - set(label2id))
    if unknown:
        raise ValueError(f"{argument}: the model has no class {unknown[0]}; it knows {', '.join(label2id)}")
    numbers = [label2id[name] for name in table["label"]]
    return table.remove_columns("label").add_column("label", numbers)


def save_seen(folder: str, **keys: Sequence[str]) -> None:
    """Save the `row_key`s of one or more kinds (`train`, `fit`) in a classifier's folder; other kinds are kept."""
    hashes = {kind: np.array([int(key, 16) for key in values], dtype=np.uint64) for kind, values in keys.items()}
    path = Path(folder, SEEN_FILE)
    partial = f"{path}.partial"
    arrays: dict[str, Any] = {**_load_seen(folder), **hashes}
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _load_seen(folder: str) -> dict[str, np.ndarray]:
    path = Path(folder, SEEN_FILE)
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            seen = dict(file)
    except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"model_name_or_path: {path} is damaged: {error}") from error
    if any(array.dtype != np.uint64 or array.ndim != 1 for array in seen.values()):
        raise ValueError(f"model_name_or_path: {path} is damaged: it has something else than hashes of rows")
    return seen


def leave_out_seen(table: Dataset, folder: str, kinds: Sequence[str], argument: str) -> tuple[Dataset, int]:
    """The rows that a classifier has not seen, and the number of rows that it has.

    ValueError if none is left, or if it is not known what it has seen.
    """
    known = _load_seen(folder)
    if "train" not in known:
        raise ValueError(f"model_name_or_path: {folder} has no {SEEN_FILE}, so what training has seen is not known")
    seen = np.concatenate([np.empty(0, np.uint64), *(known[kind] for kind in kinds if kind in known)])
    rows = np.array([int(key, 16) for key in table["row_key"]], dtype=np.uint64)
    unseen = np.flatnonzero(~np.isin(rows, seen))
    if not len(unseen):
        raise ValueError(f"{argument}: {' or '.join(kinds)} has seen all {len(rows)} rows; name other data")
    return table.select(unseen), len(rows) - len(unseen)


class TextCollator:
    """Turns rows of texts into a batch, padded on the right.

    Args:
        tokenizer: the model's tokenizer.
        columns: one text column, or two for pairs.
        max_length: maximum length in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], max_length: int):
        self.tokenizer, self.columns, self.max_length = tokenizer, list(columns), max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        first, *second = ([row[name] for row in rows] for name in self.columns)
        batch = tokenize(self.tokenizer, first, self.max_length, *second).padded()
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


class ImageCollator:
    """Turns rows of images into a batch.

    Args:
        processor: the model's image processor.
    """

    def __init__(self, processor: Callable):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}
