"""Reading texts without labels from files of any accepted format."""

import os

from datasets import Dataset, IterableDataset

from .headings import check_archive, find_hint, find_suffix
from .tables import FORMATS, READ_ERRORS, check_csv, check_file, load_file, read_reason, read_table

MIN_WORDS = 3


def read_corpus(
    path: str, text_column: str, streaming: bool = False, argument: str = "train_file"
) -> Dataset | IterableDataset:
    """Read texts from a .txt file (one paragraph per line), or from a csv, tsv, jsonl or parquet file; each also .gz.

    Args:
        path: the file.
        text_column: the column that contains the texts; `text` for a .txt file.
        streaming: read the file while it is used.
        argument: the name that errors give to the file.

    Returns:
        a `Dataset`, or an `IterableDataset` when `streaming`, with one column `text`: see `check_corpus`.

    Raises:
        ValueError: the file cannot be read, or has no such texts.
    """
    check_file(path, argument)
    if os.path.getsize(path) == 0:
        raise ValueError(f"{argument}: {path} is empty")
    suffix = find_suffix(path)
    check_archive(path, argument)
    if suffix != ".txt":
        if suffix not in FORMATS:
            raise ValueError(f"{argument}: {path} has an unknown format; use one of .txt, {', '.join(FORMATS)}")
        if not streaming:
            return check_corpus(read_table(path, argument), text_column, argument)
        builder, options = FORMATS[suffix]
    else:
        builder, options = "text", {}
        if text_column != "text":
            raise ValueError(f"text_column: {path} has no column {text_column}; the column of a .txt file is text")
    check_csv(path, suffix, argument)
    try:
        table = load_file(builder, path, streaming=streaming, **options)
        return check_corpus(table, text_column, argument)
    except READ_ERRORS as error:
        if str(error).startswith(f"{argument}: "):
            raise
        reason = read_reason(error)
        hint = find_hint(path, suffix, reason)
        raise ValueError(f"{argument}: {path} cannot be read as {suffix[1:]}: {reason}{hint}") from error


def check_corpus(
    table: Dataset | IterableDataset, text_column: str, argument: str = "train_file"
) -> Dataset | IterableDataset:
    """The texts of a table that have at least three words, in one column `text`; ValueError if there are none."""
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


def _long_enough(row: dict) -> bool:
    text = row["text"]
    return isinstance(text, str) and len(text.split(maxsplit=MIN_WORDS)) >= MIN_WORDS
