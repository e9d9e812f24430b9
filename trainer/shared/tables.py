"""Reading tables of any accepted format, checking their texts, and drawing and holding out rows."""

import csv
import gzip
import io
import os
import re
import zlib
from typing import IO, Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

# File suffix: the builder of `datasets` and its options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}

# What datasets, pandas, pyarrow and gzip raise for files that are cut off, damaged or of another kind.
READ_ERRORS = (
    *(datasets.exceptions.DatasetsError, pa.ArrowException, EOFError, OSError, ValueError, TypeError, LookupError),
    *(NotImplementedError, OverflowError, RecursionError, zlib.error),
)


def read_table(path: str, argument: str = "train_file") -> Dataset:
    """Read a csv, tsv, jsonl or parquet file, each also .gz; ValueError naming `argument` for any other file."""
    if not os.path.isfile(path):
        raise ValueError(f"{argument}: {path} is not a file")
    suffix = os.path.splitext(re.sub(r"\.gz$", "", path.lower()))[1]
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(f"{argument}: {path} has an unknown format; use one of {known}, also with .gz")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{argument}: {path} is empty")
    check_names(path, suffix, argument)
    try:
        table = _load(path, suffix)
    except READ_ERRORS as error:
        cause = read_reason(error)
        if "corresponds to no data" in cause:  # the message of datasets for a header without rows
            raise ValueError(f"{argument}: {path} has no rows") from error
        raise ValueError(f"{argument}: {path} cannot be read as {suffix[1:]}: {cause}") from error
    if len(table) == 0:
        raise ValueError(f"{argument}: {path} has no rows")
    return table


def read_reason(error: Exception) -> str:
    """Why a file cannot be read, in one line: the error that datasets' own error hides."""
    cause = error.__cause__ or error.__context__ or error
    text = str(cause) or str(error)
    return (text.splitlines() or [type(cause).__name__])[0][:300]


def check_names(path: str, suffix: str, argument: str) -> None:
    """ValueError if the heading of a csv or tsv file has a name twice, of which pandas would rename the second."""
    if suffix not in (".csv", ".tsv"):
        return
    csv.field_size_limit(2**31 - 1)
    try:
        with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
            lines = io.TextIOWrapper(cast(IO[bytes], file), encoding="utf-8-sig", newline="")
            names = next(csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ","), [])
    except (EOFError, OSError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ValueError(f"{argument}: {path} cannot be read as {suffix[1:]}: {read_reason(error)}") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{argument}: {path} has the column {twice} twice; name each column once")


def _load(path: str, suffix: str) -> Dataset:
    if suffix == ".parquet" and path.lower().endswith(".gz"):  # the only format that datasets does not decompress
        with pa.input_stream(path, compression="gzip") as stream:
            return Dataset(pq.read_table(pa.BufferReader(stream.read())))
    builder, options = FORMATS[suffix]
    return datasets.load_dataset(builder, data_files=path, split="train", **options)


def draw_rows(table: Dataset, limit: int | None, seed: int) -> Dataset:
    """`limit` random rows of a table; all rows in their order if there is no limit or there are not more."""
    return table if limit is None or limit >= len(table) else table.shuffle(seed=seed).select(range(limit))


def hold_out(table: Dataset, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `rows` rows for evaluation. Rows with the same first text (anchor) stay in the same part.

    Raises:
        ValueError: all rows have the same first text.
    """
    first = np.asarray(table[table.column_names[0]], dtype=object)
    _, group = np.unique(first.astype(str), return_inverse=True)
    if group.max() == 0:
        raise ValueError(
            f"max_eval_samples: all {len(table)} rows have the same {table.column_names[0]}, so none can be held out; "
            "pass --max_eval_samples 0, or name data to evaluate on"
        )
    order = np.random.default_rng(seed).permutation(group.max() + 1)
    sizes = np.bincount(group)[order].cumsum()
    chosen = np.zeros(group.max() + 1, dtype=bool)
    chosen[order[: max(1, int(np.searchsorted(sizes, rows, side="right")))]] = True
    held = chosen[group]
    return table.select(np.flatnonzero(~held)), table.select(np.flatnonzero(held))


def check_texts(table: Dataset, name: str, argument: str, optional: bool) -> None:
    """ValueError naming the column if it does not contain texts, or if a text is empty and not `optional`."""
    column = table.with_format("arrow")[:][name]
    if optional and str(column.type) == "null":
        return
    if str(column.type) not in ("string", "large_string"):
        raise ValueError(f"{argument}: column {name} holds {column.type}, not texts")
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(column, ""))), 0)
    count = pc.sum(empty).as_py()
    if count and not optional:
        row = pc.index(empty, True).as_py()
        raise ValueError(
            f"{argument}: column {name} holds {count} empty texts, the first in row {row + 1}; remove these rows"
        )
