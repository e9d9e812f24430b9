"""Texts from files, one after another and with ids; a line that cannot be used is reported, not raised.

An empty text is a text: corpora have documents without words, and their ids must have a vector.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, cast

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
STDIN = "-"


class Text(NamedTuple):
    """A text and its id."""

    id: str
    text: str


class Malformed(NamedTuple):
    """A line without a usable text: its number from 1, and the reason."""

    line: int
    reason: str


def read_texts(path: str, text_column: str = "text", id_column: str | None = None) -> Iterator[Text | Malformed]:
    """The texts of a file, of the corpus of a folder in BEIR layout, or of standard input.

    Args:
        path: .txt (one text per line), .csv, .tsv, .jsonl or .parquet, all except the last also with .gz; or a folder
            with a `corpus.jsonl`, or `-` for standard input (one text per line).
        text_column: column of a table.
        id_column: default: `_id` or `id` if there is one, else the row's number from 0.

    Raises:
        ValueError: the file is missing, has an unknown format, or does not have the column.
    """
    if path == STDIN:
        return _lines(sys.stdin.buffer)
    if os.path.isdir(path):
        corpus = os.path.join(path, "corpus.jsonl")
        if not os.path.isfile(corpus):
            raise ValueError(f"input: {path} is a folder without a corpus.jsonl")
        return _objects(_open(corpus), text_column, id_column, title=True)
    if not os.path.isfile(path):
        raise ValueError(f"input: {path} is not a file")
    suffix = _suffix(path)
    if suffix == ".txt":
        return _lines(_open(path))
    if suffix == ".jsonl":
        return _objects(_open(path), text_column, id_column, title=False)
    if suffix in (".csv", ".tsv"):
        return _table(_open(path), "\t" if suffix == ".tsv" else ",", text_column, id_column)
    if suffix == ".parquet" and not path.lower().endswith(".gz"):
        return _parquet(path, text_column, id_column)
    raise ValueError(f"input: {path} has an unknown format; use one of {', '.join(SUFFIXES)}, the first four also .gz")


def count_lines(path: str) -> int | None:
    """Approximate number of texts; None if it cannot be known."""
    if path == STDIN:
        return None
    if _suffix(path) == ".parquet":
        import pyarrow.parquet as pq

        return pq.ParquetFile(path).metadata.num_rows
    path = os.path.join(path, "corpus.jsonl") if os.path.isdir(path) else path
    count, last = 0, b"\n"
    with _open(path) as file:
        for block in iter(lambda: file.read(2**20), b""):
            count, last = count + block.count(b"\n"), block[-1:]
    heading = _suffix(path) in (".csv", ".tsv")
    return count + (last != b"\n") - heading


def _suffix(path: str) -> str:
    return os.path.splitext(re.sub(r"\.gz$", "", path.lower()))[1]


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb"))


def _numbered(file: Iterable[bytes]) -> Iterator[tuple[int, str] | Malformed]:
    """Lines and their numbers from 1, decoded."""
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Malformed(number, f"byte {error.start + 1} is not UTF-8")
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"input: the compressed file ends after line {number}: {error}") from error


def _lines(file: Iterable[bytes]) -> Iterator[Text | Malformed]:
    for item in _numbered(file):
        if isinstance(item, Malformed):
            yield item
        else:
            number, line = item
            yield _text(number, str(number - 1), line)


def _objects(file: Iterable[bytes], text_column: str, id_column: str | None, title: bool) -> Iterator[Text | Malformed]:
    for item in _numbered(file):
        if isinstance(item, Malformed):
            yield item
            continue
        number, line = item
        try:
            row = json.loads(line)
        except ValueError as error:
            yield Malformed(number, f"it is not JSON: {error}")
            continue
        if not isinstance(row, dict):
            yield Malformed(number, "it is not a JSON object")
            continue
        if title and isinstance(row.get(text_column), str):
            row[text_column] = f"{row.get('title') or ''} {row[text_column]}".strip()
        yield _row(number, row, text_column, id_column)


def _table(file: BinaryIO, delimiter: str, text_column: str, id_column: str | None) -> Iterator[Text | Malformed]:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    reader = csv.DictReader(lines, delimiter=delimiter)
    names = reader.fieldnames or []
    for name in (text_column, id_column):
        if name is not None and name not in names:
            raise ValueError(f"input: there is no column {name} among {', '.join(names) or 'none'}")
    for index, row in enumerate(reader):
        number = reader.line_num
        if None in row or None in row.values():
            yield Malformed(number, f"it does not have {len(names)} columns")
        else:
            yield _row(number, row, text_column, id_column, index)


def _parquet(path: str, text_column: str, id_column: str | None) -> Iterator[Text | Malformed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"input: {path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    names = file.schema_arrow.names
    for name in (text_column, id_column):
        if name is not None and name not in names:
            raise ValueError(f"input: there is no column {name} among {', '.join(names)}")
    rows = (row for batch in file.iter_batches(4096) for row in batch.to_pylist())
    for index, row in enumerate(rows):
        yield _row(index + 1, row, text_column, id_column)


def _row(number: int, row: dict, text_column: str, id_column: str | None, index: int | None = None) -> Text | Malformed:
    if text_column not in row:
        return Malformed(number, f"it has no {text_column}")
    name = id_column or next((name for name in ("_id", "id") if name in row), None)
    if name is not None and row.get(name) in (None, ""):
        return Malformed(number, f"it has no {name}")
    return _text(number, str(row[name] if name else (number - 1 if index is None else index)), row[text_column])


def _text(number: int, id: str, text) -> Text | Malformed:
    if not isinstance(text, str):
        return Malformed(number, f"its text is a {type(text).__name__}")
    return Text(id, text)
