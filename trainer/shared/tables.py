"""Reading tables of any accepted format, checking their texts, and drawing and holding out rows."""

import csv
import gzip
import io
import math
import os
import zlib
from collections.abc import Sequence
from typing import IO, Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import logging

from .headings import check_format, check_heading, find_hint, find_suffix

logger = logging.get_logger(__name__)

# File suffix: the builder of `datasets` and its options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    **dict.fromkeys((".jsonl", ".ndjson"), ("json", {})),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}

# The end of an error about rows that finetune.py can leave out.
INVALID_ROWS = "; remove these rows, or pass --skip_invalid true to finetune.py"

# What is written as text, but is none, if all rows of a column are so.
_NO_TEXTS = (
    (r"""(?s)^\s*(\[\s*['"].*['"]\s*\]|\{\s*['"].*\})\s*$""", "lists or objects written as text"),
    (r"^[!-~]{0,40}[0-9][!-~]{0,40}$", "ids"),
)

_SAMPLE = 1000

# What datasets, pandas, pyarrow and gzip raise for files that are cut off, damaged or of another kind.
READ_ERRORS = (
    *(datasets.exceptions.DatasetsError, pa.ArrowException, EOFError, OSError, ValueError, TypeError, LookupError),
    *(NotImplementedError, OverflowError, RecursionError, zlib.error),
)


def read_table(path: str, argument: str = "train_file", split: str = "train") -> Dataset:
    """Read a table.

    Args:
        path: a csv, tsv, jsonl or parquet file, each also .gz, or a folder of `datasets.save_to_disk`.
        argument: the name that errors give to the table.
        split: of a folder with several splits; several are joined by `+`. The only split of a folder is always read.

    Raises:
        ValueError: the file has another format, or cannot be read.
    """
    if is_saved(path):
        first, *others = read_splits(path, argument, split)
        if others:
            raise ValueError(f"{argument}: the splits {split} of {path} have different columns; name one of them")
        return first
    check_file(path, argument)
    check_format(path, argument)
    suffix = find_suffix(path)
    check_csv(path, suffix, argument)
    try:
        table = _load(path, suffix)
        table.data.validate(full=True)  # pyarrow reads JSON without looking at its encoding
    except READ_ERRORS as error:
        cause = read_reason(error)
        if "corresponds to no data" in cause:  # the message of datasets for a header without rows
            raise ValueError(f"{argument}: {path} has no rows") from error
        hint = find_hint(path, suffix, cause)
        raise ValueError(f"{argument}: {path} cannot be read as {suffix[1:]}: {cause}{hint}") from error
    if len(table) == 0:
        raise ValueError(f"{argument}: {path} has no rows")
    return as_strings(table)


def check_file(path: str, argument: str) -> None:
    """ValueError if a path is not a file."""
    if os.path.isdir(path):
        raise ValueError(f"{argument}: {path} is a folder, but none of datasets.save_to_disk; name a file")
    if not os.path.isfile(path):
        raise ValueError(f"{argument}: {path} is not a file")


def as_strings(table: Dataset, *more: str) -> Dataset:
    """The table with its texts of Polars' type string_view, and of the types `more`, as texts of the type string."""
    kinds = {name: getattr(feature, "dtype", None) for name, feature in table.features.items()}
    others = [name for name, kind in kinds.items() if kind in ("string_view", *more)]
    features = datasets.Features({**table.features, **{name: datasets.Value("string") for name in others}})
    return table.cast(features) if others else table


def require_table(table: object, argument: str) -> Dataset:
    """The table itself; ValueError if it has no rows, and for everything else that people have, which says how to make
    a table of it."""
    if isinstance(table, Dataset):
        if not len(table):
            raise ValueError(f"{argument}: the table has no rows")
        return table
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(f"{argument}: a DatasetDict is a dict of splits; pass one of {', '.join(map(str, table))}")
    if isinstance(table, datasets.IterableDataset):
        raise ValueError(
            f"{argument}: an IterableDataset has no number of rows; load it without streaming=True, or make a Dataset "
            "of its first rows with Dataset.from_list(list(dataset.take(ROWS)))"
        )
    raise ValueError(
        f"{argument}: a datasets.Dataset is needed, not {type(table).__name__}; make one with Dataset.from_list, "
        "Dataset.from_dict, Dataset.from_pandas, or datasets.load_dataset for a file"
    )


def read_reason(error: Exception) -> str:
    """Why a file cannot be read, in one line: the error that datasets' own error hides."""
    cause = error.__cause__ or error.__context__ or error
    text = str(cause) or str(error)
    return (text.splitlines() or [type(cause).__name__])[0][:300]


def check_csv(path: str, suffix: str, argument: str) -> None:
    """ValueError for what pandas would read in another way than it is meant, in a csv or tsv file.

    It renames the second of two columns of one name, joins lines if a quotation mark opens a cell and is not closed
    there, and moves the columns if rows are longer than the heading.
    """
    if suffix not in (".csv", ".tsv"):
        return
    check_heading(path, argument)
    csv.field_size_limit(2**31 - 1)
    try:
        with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
            lines = io.TextIOWrapper(cast(IO[bytes], file), encoding="utf-8-sig", newline="")
            rows = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            names = next(rows, [])
            longer = joined = 0
            for row in rows:
                if len(row) > len(names):
                    longer = longer or rows.line_num
                if suffix == ".tsv" and any("\t" in cell and "\n" in cell for cell in row):
                    joined = joined or rows.line_num
    except csv.Error as error:
        raise ValueError(f"{argument}: line {rows.line_num} of {path} is not {suffix[1:]}: {error}") from error
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        reason = read_reason(error)
        hint = find_hint(path, suffix, reason)
        raise ValueError(f"{argument}: {path} cannot be read as {suffix[1:]}: {reason}{hint}") from error
    twice = next((name for name in names if name.strip() and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{argument}: {path} has the column {twice} twice; name each column once")
    if longer:
        columns = "one column" if len(names) == 1 else f"{len(names)} columns"
        raise ValueError(f"{argument}: line {longer} of {path} has more than the {columns} of the first line")
    if joined:
        raise ValueError(
            f"{argument}: line {joined} of {path} is joined with an earlier one by a quotation mark that opens a cell; "
            "write such a mark twice, in quotes"
        )


def is_saved(path: str) -> bool:
    """Whether a path is a folder of `datasets.save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def open_saved(path: str, argument: str) -> Dataset | datasets.DatasetDict:
    """What `datasets.save_to_disk` has written; ValueError if it is damaged."""
    try:
        return datasets.load_from_disk(path)
    except (*READ_ERRORS, AttributeError) as error:  # the second: JSON of another kind
        raise ValueError(f"{argument}: {path} cannot be read as a saved dataset: {read_reason(error)}") from error


def read_splits(path: str, argument: str, split: str) -> list[Dataset]:
    """The splits of a folder of `datasets.save_to_disk`: one table, or several if their columns differ.

    Raises:
        ValueError: a split does not exist, or has no rows.
    """
    loaded = open_saved(path, argument)
    if isinstance(loaded, Dataset):
        loaded = datasets.DatasetDict({split: loaded})
    names = list(loaded) if len(loaded) == 1 else split.split("+")
    absent = [name for name in names if name not in loaded]
    if absent:
        raise ValueError(f"{argument}: {path} has no split {absent[0]}; it has {', '.join(loaded)}")
    tables = [as_strings(loaded[name]) for name in names]
    if all(table.features == tables[0].features for table in tables):
        tables = [datasets.concatenate_datasets(tables)]
    if not all(map(len, tables)):
        raise ValueError(f"{argument}: {path} has no rows")
    return tables


def _load(path: str, suffix: str) -> Dataset:
    if suffix == ".parquet" and path.lower().endswith(".gz"):  # the only format that datasets does not decompress
        with pa.input_stream(path, compression="gzip") as stream:
            return Dataset(pq.read_table(pa.BufferReader(stream.read())))
    builder, options = FORMATS[suffix]
    return load_file(builder, path, **options)


def load_file(builder: str, path: str, **options: Any) -> Any:
    """The rows of a file, read by one of the builders of `datasets`, whose own lines about an error are not shown."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(builder, data_files=path, split="train", **options)
    finally:
        datasets.logging.set_verbosity(verbosity)


def load_hub_dataset(name: str, config: str | None, **options: Any) -> Any:
    """A dataset of the Hub; ValueError with its name if it cannot be reached, or has no such configuration or split.

    `options` are passed to `datasets.load_dataset`.
    """
    try:
        return datasets.load_dataset(name, config, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"dataset_name: {name} cannot be read: {reason}") from error


def text_columns(table: Dataset) -> list[str]:
    """The columns that contain texts, in the order of their roles."""
    return [name for name in table.column_names if name != "score" and not name.endswith("_score")]


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
            "use rows with different ones, or 0 for no evaluation"
        )
    order = np.random.default_rng(seed).permutation(group.max() + 1)
    if np.bincount(group)[order[0]] > rows:  # so that a text with very many rows is not what is held out
        order = order[np.argsort(np.bincount(group)[order], kind="stable")]
    sizes = np.bincount(group)[order].cumsum()
    chosen = np.zeros(group.max() + 1, dtype=bool)
    chosen[order[: max(1, int(np.searchsorted(sizes, rows, side="right")))]] = True
    held = chosen[group]
    return table.select(np.flatnonzero(~held)), table.select(np.flatnonzero(held))


def skip_rows(table: Dataset, names: Sequence[str], argument: str) -> Dataset:
    """Leave out the rows with an empty text, or with a score that is not a finite number, and say how many.

    Args:
        table: the table.
        names: the columns to look at.
        argument: the name that the note and errors give to the table.

    Raises:
        ValueError: no row is left.
    """

    def is_valid(row: dict) -> bool:
        for name in names:
            value = row[name]
            if name == "score":
                try:
                    if not math.isfinite(float(value)):
                        return False
                except (TypeError, ValueError):
                    return False
            elif not isinstance(value, str) or not value.strip():
                return False
        return True

    kept = np.flatnonzero([is_valid(row) for row in table.select_columns(list(names))])
    if len(kept) == 0:
        raise ValueError(f"{argument}: none of the {len(table)} rows is valid")
    if len(kept) < len(table):
        few = len(table) - len(kept)
        verb = "is" if few == 1 else "are"
        logger.warning(f"{argument}: {few} of {len(table)} rows {verb} not valid and {verb} left out")
    return table.select(kept)


def check_texts(table: Dataset, name: str, argument: str, optional: bool) -> None:
    """ValueError naming the column if it does not contain texts, or if a text is empty and not `optional`."""
    column = table.with_format("arrow")[:][name]
    if optional and str(column.type) == "null":
        return
    if str(column.type) not in ("string", "large_string"):
        raise ValueError(f"{argument}: column {name} holds {_describe_kind(column.type)}, not texts")
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(column, ""))), 0)
    count = pc.sum(empty).as_py()
    if count and not optional:
        row = pc.index(empty, True).as_py()
        texts = "an empty text" if count == 1 else f"{count} empty texts, the first"
        raise ValueError(f"{argument}: column {name} holds {texts} in row {row + 1}{INVALID_ROWS}")


def refuse_codes(table: Dataset, name: str, argument: str) -> None:
    """ValueError if all texts of a column that pairs are trained or scored on are ids, or lists written as text."""
    column = table.with_format("arrow")[:][name].drop_null()
    if len(column) < 2:
        return
    column = column.filter(pc.not_equal(column, ""))
    for pattern, what in _NO_TEXTS:
        parts = (column[:_SAMPLE], column)  # the first rows of most columns show that they are texts
        if all(pc.all(pc.match_substring_regex(part, pattern)).as_py() for part in parts) and len(column.unique()) > 1:
            raise ValueError(f"{argument}: column {name} holds {what}, such as {column[0].as_py()[:40]!r}, not texts")


def _describe_kind(kind: pa.DataType) -> str:
    """What a column without texts holds."""
    if pa.types.is_struct(kind):
        return f"objects with the fields {', '.join(field.name for field in kind)}"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "lists"
    return "texts and other values" if str(kind) == "extension<arrow.json>" else str(kind)
