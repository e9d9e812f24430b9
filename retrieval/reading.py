"""Texts from files, one after another and with ids; a line that cannot be used is reported, not raised.

An empty text is a text: corpora have documents without words, and their ids must have a vector.
"""

import contextlib
import csv
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
STDIN = "-"
# The column of ids of texts that need none: they are numbered, whatever columns there are.
NO_IDS = ""
# What Python raises for a compressed file that is cut off or has other bytes than were written.
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
# csv refuses longer fields unless it is told a limit; a text may be as long as it is.
_FIELD_LIMIT = 2**31 - 1
# What a cell of a tsv file that has tabs and line breaks is: hardly ever one that somebody has written.
_JOINED = "a quotation mark that opens a cell joins it with an earlier line; write such a mark twice, in quotes"
# Half of a pair in JSON, or a byte of a table that is not UTF-8. No text in UTF-8 has one.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Text(NamedTuple):
    """A text, its id, and the title of its row, with which the text of a BEIR document starts; see `read_title`."""

    id: str
    text: str
    title: str | None = ""


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
        id_column: default: `_id` or `id` if there is one, else the row's number from 0; that always with `NO_IDS`.

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
    if suffix in (".jsonl", ".ndjson"):
        return _objects(_open(path), text_column, id_column, title=False)
    if suffix in (".csv", ".tsv"):
        return _table(_open(path), "\t" if suffix == ".tsv" else ",", text_column, id_column)
    check_format(path)
    return _parquet(path, text_column, id_column)


def check_format(path: str, text_column: str = "text", argument: str = "input") -> None:
    """ValueError for a file of a format that `read_texts` does not read, or a column of one that has none."""
    suffix = ".txt" if path == STDIN else _suffix(path)
    if suffix not in SUFFIXES or path.lower().endswith(".parquet.gz"):
        raise ValueError(
            f"{argument}: {path} has an unknown format; use one of {', '.join(SUFFIXES)}, all but the last also .gz"
        )
    if suffix == ".txt" and text_column != "text":
        where = "standard input" if path == STDIN else path
        raise ValueError(f"text_column: {text_column} is not allowed; {where} has a text per line and no columns")


def read_title(value: object) -> str | None:
    """The title that a cell has: numbers and dates as text, "" for a missing one, None for what is no title.

    >>> read_title(" Cats "), read_title(12), read_title(None), read_title(["Cats"])
    ('Cats', '12', '', None)
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):  # pandas writes NaN for a missing one
        return ""
    if isinstance(value, (dict, list, bool, bytes)):
        return None
    title = str(value).strip()
    return None if _SURROGATE.search(title) else title


def count_lines(path: str) -> int | None:
    """Approximate number of texts; None if it cannot be known."""
    if path == STDIN:
        return None
    if _suffix(path) == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(path).metadata.num_rows
        except (pa.ArrowException, OSError):  # the reader reports it
            return None
    path = os.path.join(path, "corpus.jsonl") if os.path.isdir(path) else path
    count, last = 0, b"\n"
    with contextlib.suppress(*_GZIP_ERRORS), _open(path) as file:  # the reader reports them
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
    except _GZIP_ERRORS as error:
        raise _damaged(number, error) from error


def _damaged(number: int, error: Exception) -> ValueError:
    """The error of a compressed file that can be read up to a line."""
    state = "ends" if isinstance(error, EOFError) else "is damaged"
    return ValueError(f"input: the compressed file {state} after line {number}: {error}")


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
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            yield Malformed(number, f"it is not JSON ({error}); each line has to be an object")
            continue
        if not isinstance(row, dict):
            yield Malformed(number, "it is not a JSON object; each line has to be one")
            continue
        if title and text_column != "title" and isinstance(row.get(text_column), str):
            before = read_title(row.get("title"))
            if before is None:
                yield Malformed(number, "its title is no text")
                continue
            row[text_column] = f"{before} {row[text_column]}".strip()
        yield _row(number, row, text_column, id_column)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError if a name appears twice, of which Python would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} appears twice")
    return row


def _table(file: BinaryIO, delimiter: str, text_column: str, id_column: str | None) -> Iterator[Text | Malformed]:
    csv.field_size_limit(_FIELD_LIMIT)
    # Bytes that are not UTF-8 become surrogates, which `_text` reports with their row.
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Without `strict`, a quotation mark that is never closed would make one text of all the lines after it.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    index = 0
    try:
        names = next(reader, [])
        _check_columns(names, text_column, id_column)
        for values in _records(reader):
            if values == []:  # an empty line
                continue
            if isinstance(values, Malformed):
                yield values
            elif delimiter == "\t" and any("\t" in value and "\n" in value for value in values):
                yield Malformed(reader.line_num, _JOINED)
            elif len(values) != len(names):
                yield Malformed(reader.line_num, f"it does not have {len(names)} columns")
            else:
                row = dict(zip(names, values, strict=True))
                yield _row(reader.line_num, row, text_column, id_column, index)
            index += 1
    except _GZIP_ERRORS as error:
        raise _damaged(reader.line_num, error) from error
    except csv.Error as error:  # in the heading
        raise ValueError(f"input: line {reader.line_num} is not CSV: {error}") from error


def _records(reader) -> Iterator[list[str] | Malformed]:
    """The rows of a csv.reader; after one that is not CSV, it continues with the next line."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Malformed(reader.line_num, f"it is not CSV: {error}")


def _check_columns(names: list[str], text_column: str, id_column: str | None) -> None:
    """ValueError if a table does not have its columns, or has one twice."""
    for name in (text_column, id_column):
        if name not in (None, NO_IDS, *names):
            shown = ", ".join(names).encode("utf-8", "replace").decode("utf-8") or "none"
            raise ValueError(f"input: there is no column {name} among {shown}")
    for name in (text_column, *(("_id", "id") if id_column is None else (id_column,))):
        if names.count(name) > 1:
            raise ValueError(f"input: there are {names.count(name)} columns {name}; name each column once")


def _parquet(path: str, text_column: str, id_column: str | None) -> Iterator[Text | Malformed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow.names, text_column, id_column)
        ids = ("_id", "id") if id_column is None else (id_column,)
        wanted = [name for name in file.schema_arrow.names if name in (text_column, *ids, "title")]
        rows = (row for batch in file.iter_batches(4096, columns=wanted) for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield _row(index + 1, row, text_column, id_column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"input: {path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _row(number: int, row: dict, text_column: str, id_column: str | None, index: int | None = None) -> Text | Malformed:
    if text_column not in row:
        return Malformed(number, f"it has no {text_column}")
    name = id_column or None
    if id_column is None:
        name = next((name for name in ("_id", "id") if name in row), None)
    if name is not None and row.get(name) in (None, ""):
        return Malformed(number, f"it has no {name}")
    if name is not None and isinstance(row[name], (dict, list, bool, bytes)):
        return Malformed(number, f"its {name} is a {type(row[name]).__name__}")
    if name is not None and isinstance(row[name], float) and not math.isfinite(row[name]):
        return Malformed(number, f"its {name} is {row[name]}")
    text = _text(number, str(row[name] if name else (number - 1 if index is None else index)), row[text_column])
    if isinstance(text, Malformed) or text_column == "title":
        return text
    return text._replace(title=read_title(row.get("title")))


def _text(number: int, id: str, text) -> Text | Malformed:
    if not isinstance(text, str):
        return Malformed(number, f"its text is a {type(text).__name__}")
    for what, value in (("text", text), ("id", id)):
        wrong = _SURROGATE.search(value)
        if wrong is not None:
            return Malformed(number, f"character {wrong.start() + 1} of its {what} is not valid Unicode")
    if "\0" in id:
        return Malformed(number, f"its id {id!r} has a NUL character")
    return Text(id, text)
