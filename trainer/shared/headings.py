"""What the start of a file shows before a library reads it: its encoding, and what separates the columns of a table.

Imports no library, so that a script refuses a file at once.
"""

import codecs
import contextlib
import csv
import gzip
import json
import os
import re
import zlib

# Of files that are read as tables.
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
# Bytes of a file that are looked at.
_SAMPLE = 1 << 20
# What the first bytes of a file say that it is, and what to do with it.
_ARCHIVES = (
    (b"\x1f\x8b", "compressed by gzip: add .gz to its name"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook: unpack it, or save it as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook: save it as CSV (UTF-8)"),
    (b"PAR1", "parquet: name it .parquet"),
    (b"BZh", "compressed by bzip2: unpack it"),
    (b"\xfd7zXZ", "compressed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
)
# A name of each encoding that people have, and what iconv calls it.
_ICONV = {"UTF-16": "utf-16", "UTF-16LE": "utf-16le", "UTF-16BE": "utf-16be", "Latin-1": "latin1",
          "Windows-1252": "windows-1252"}  # fmt: skip
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "vertical bars"}


def find_suffix(path: str) -> str:
    """The suffix of a file name in lower case, without .gz.

    >>> find_suffix("Pairs.CSV.gz")
    '.csv'
    """
    return os.path.splitext(re.sub(r"\.gz$", "", path.lower()))[1]


def check_format(path: str, argument: str) -> None:
    """ValueError for a file of a table that has another suffix, or is empty."""
    if find_suffix(path) not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        advice = "; save the sheet as CSV (UTF-8)" if find_suffix(path) in (".xlsx", ".xls", ".ods") else ""
        raise ValueError(f"{argument}: {path} has an unknown format; use one of {known}, also with .gz{advice}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{argument}: {path} is empty")
    check_archive(path, argument)


def check_archive(path: str, argument: str) -> None:
    """ValueError if the first bytes of a file of lines or of a table say that it is something else."""
    with open(path, "rb") as file:
        start = file.read(8)
    zipped = start.startswith(_ARCHIVES[0][0])
    if path.lower().endswith(".gz"):
        if start and not zipped:
            raise ValueError(f"{argument}: {path} is not compressed by gzip; remove .gz from its name")
    elif find_suffix(path) != ".parquet" or zipped:
        for mark, what in _ARCHIVES:
            if start.startswith(mark):
                raise ValueError(f"{argument}: {path} is {what}")


def check_heading(path: str, argument: str) -> None:
    """ValueError if a file is an archive, or the first line of a csv or tsv file of another encoding, or has another
    separator, or is empty."""
    check_archive(path, argument)
    suffix = find_suffix(path)
    if suffix not in (".csv", ".tsv"):
        return
    start = _read_start(path)
    heading = start.partition(b"\n")[0]
    encoding = _encoding_of(heading)
    if encoding is not None:
        raise ValueError(f"{argument}: {path} cannot be read as {suffix[1:]}: {_convert(encoding)}")
    if start and heading.strip(codecs.BOM_UTF8 + b" \t\r,") == b"":
        raise ValueError(f"{argument}: the first line of {path} is empty; write the names of the columns there")
    if separated := _separator_hint(heading.decode("utf-8", errors="replace"), suffix):
        raise ValueError(f"{argument}: {path} has only one column{separated}")


def check_encoding(path: str, argument: str) -> None:
    """ValueError if a file of texts is an archive or UTF-16, whose English lines look like UTF-8 with NUL characters,
    or has a heading that `check_heading` refuses."""
    check_heading(path, argument)
    encoding = _encoding_of(_read_start(path)[:2]) or ""
    if encoding.startswith("UTF-16"):
        raise ValueError(f"{argument}: {path}: {_convert(encoding)}")


def read_names(path: str) -> list[str] | None:
    """The names of the columns of a csv or tsv file, or of the first line of a jsonl file; None for other files."""
    suffix = find_suffix(path)
    if not os.path.isfile(path):
        return None
    if suffix in (".jsonl", ".ndjson"):
        with contextlib.suppress(ValueError, RecursionError):  # the reader says what is wrong
            first = json.loads(_read_start(path).partition(b"\n")[0])
            return list(first) if isinstance(first, dict) else None
    if suffix not in (".csv", ".tsv"):
        return None
    heading = _read_start(path).partition(b"\n")[0].decode("utf-8-sig", errors="replace")
    return next(csv.reader([heading.rstrip("\r")], delimiter="\t" if suffix == ".tsv" else ","), [])


def find_hint(path: str, suffix: str, cause: str) -> str:
    """What is probably wrong with a file, as the end of an error; nothing if there is no sign.

    Args:
        path: the file.
        suffix: its suffix, without .gz.
        cause: the error of the library that has read it.
    """
    if suffix == ".parquet":
        return ""
    start = _read_start(path)
    encoding = _encoding_of(start) or _encoding_named(cause)
    if encoding is not None:
        return f"; {_convert(encoding)}"
    if suffix in (".jsonl", ".ndjson") and start.startswith(b"["):
        return '; its lines seem to be lists: write objects, for example {"anchor": "...", "positive": "..."}'
    heading = start.partition(b"\n")[0].decode("utf-8", errors="replace")
    return _separator_hint(heading, suffix)


def _read_start(path: str) -> bytes:
    opener = gzip.open if path.lower().endswith(".gz") else open
    with contextlib.suppress(EOFError, OSError, zlib.error), opener(path, "rb") as file:  # it has an error of its own
        return file.read(_SAMPLE)
    return b""


def _encoding_of(start: bytes) -> str | None:
    """The encoding of the start of a file; None if it is UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"  # Excel's "Unicode text"
    if b"\0" in start[:2]:
        return "UTF-16BE" if start[0] == 0 else "UTF-16LE"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < _SAMPLE)
    except UnicodeDecodeError:
        # What is quotation marks and dashes in the one is nothing in the other.
        return "Windows-1252" if re.search(rb"[\x80-\x9f]", start) else "Latin-1"
    return None


def _encoding_named(cause: str) -> str | None:
    """The encoding of a file that an error calls no UTF-8, after a long start that is."""
    if "codec can't decode" not in cause and not re.search("utf-?8", cause.lower()):
        return None
    return "Windows-1252" if re.search("byte 0x[89]", cause) else "Latin-1"


def _convert(encoding: str) -> str:
    return f"it is not UTF-8, perhaps {encoding}: convert it with iconv -f {_ICONV[encoding]} -t utf-8"


def _separator_hint(heading: str, suffix: str) -> str:
    if suffix not in (".csv", ".tsv"):
        return ""
    own, name = (",", ".tsv") if suffix == ".csv" else ("\t", ".csv")
    other = next((mark for mark in _SEPARATORS if mark in heading), None)
    if own in heading or other is None:
        return ""
    advice = f"name it {name}" if other in "\t," else "separate them by commas, or by tabs as .tsv"
    return f"; its columns seem to be separated by {_SEPARATORS[other]}: {advice}"
