"""A folder of arrays that appears complete or not at all, and is checked when it is opened."""

import contextlib
import fnmatch
import json
import math
import os
import shutil
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .checking import check_fields, check_name
from .replacing import clean_up, find_folder, partial_path, replace_folder

# Format 1 has ids of equal length; format 2 has texts as ids, of any length.
FORMAT, READABLE = 2, (1, 2)
META = "index.json"
_READ = 2**24
# How often an index is opened again because it was replaced meanwhile.
_TRIES = 20
# The files of an index, see `FunnelIndex`.
_NAMES = (META, "vectors.f32", "prefix-*", "ids", "id_offsets", "texts.utf8", "text_offsets", "graph.faiss")
# Kinds of numbers and text that an array may have: never Python objects, whose bytes would be taken for addresses.
_KINDS = "iufSU"


class Writer:
    """Collects files in a temporary folder beside `path`; `commit` moves it to `path`.

    Args:
        path: the folder to write.
        overwrite: whether to replace an index at `path`.

    Raises:
        ValueError: `path` exists, and may not or must not be replaced.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool):
        self.path = Path(os.path.realpath(path))  # a link to the folder stays a link to the new one
        self._place, self._overwrite = path, overwrite
        clean_up(self.path)
        self._check_place()
        self.partial = partial_path(self.path)
        self.partial.mkdir(parents=True)
        self.files: dict[str, dict] = {}
        self._open: dict[str, BinaryIO] = {}

    def _check_place(self) -> None:
        """ValueError if what is at the path may not be replaced."""
        if self.path.is_file():
            raise ValueError(f"path: {self._place} is a file; name a folder")
        if self.path.exists() and any(self.path.iterdir()) and not self._overwrite:
            raise ValueError(f"path: {self._place} exists; name another folder, or overwrite it")
        if self._overwrite and self.path.exists():
            if not (self.path / META).is_file():
                raise ValueError(f"path: {self._place} exists and is not an index, so it is not overwritten")
            check_only_index(self.path)

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows to the end of an array."""
        rows = np.ascontiguousarray(rows)
        if name not in self._open:
            self._open[name] = open(self.partial / name, "wb")  # noqa: SIM115, closed by commit or discard
            self.files[name] = {"dtype": rows.dtype.str, "shape": [0, *rows.shape[1:]], "crc32": 0}
        entry = self.files[name]
        data = rows.tobytes()
        self._open[name].write(data)
        entry["crc32"] = zlib.crc32(data, entry["crc32"])
        entry["shape"][0] += len(rows)

    def array(self, name: str) -> np.ndarray:
        """The rows that were appended so far, mapped into memory."""
        self._open[name].flush()
        entry = self.files[name]
        return np.memmap(self.partial / name, dtype=entry["dtype"], mode="r", shape=tuple(entry["shape"]))

    def add_file(self, name: str) -> Path:
        """The path for a file that another library writes before `commit`."""
        self.files[name] = {"dtype": "|u1", "shape": [0], "crc32": 0}
        return self.partial / name

    def commit(self, meta: dict) -> None:
        """Write the description, and move the folder to its place; ValueError if that is no longer allowed."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name in self.files.keys() - self._open.keys():
            with open(self.partial / name, "rb") as written:
                self.files[name] |= {"shape": [os.fstat(written.fileno()).st_size], "crc32": _checksum(written)}
        text = json.dumps({"format": FORMAT, **meta, "files": self.files}, indent=2)
        (self.partial / META).write_text(text, encoding="utf-8")
        self._check_place()  # again: something else may have been put there meanwhile
        replace_folder(self.partial, self.path)

    def discard(self) -> None:
        """Delete everything that was written."""
        for file in self._open.values():
            file.close()
        shutil.rmtree(self.partial, ignore_errors=True)


def read(path: str | os.PathLike, verify: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """The description of a folder, and its arrays, mapped into memory.

    Args:
        path: the folder.
        verify: whether to read every file once and compare its checksum.

    Raises:
        ValueError: the folder is not an index, one of its files is missing, truncated or damaged, or `index.json` has
            something that `Writer` does not write.
    """
    for _ in range(_TRIES):
        folder = find_folder(Path(path))
        text = _read_text(folder, path)
        try:
            return _read_folder(folder, text, verify)
        except (ValueError, OSError):
            # The index is being replaced: what was read is neither the old one nor the new one.
            if _read_text(find_folder(Path(path)), path) == text:
                raise
    raise ValueError(f"path: {path} is being replaced again and again; open it later")


def _read_folder(folder: Path, text: bytes, verify: bool) -> tuple[dict, dict[str, np.ndarray]]:
    meta = _read_meta(folder / META, text)
    if meta["format"] not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ValueError(f"path: {folder} is an index of format {meta['format']}; this version reads formats {known}")
    arrays = {name: _map(folder / name, entry, verify) for name, entry in meta["files"].items()}
    if (folder / META).read_bytes() != text:
        raise ValueError(f"path: {folder} was replaced while it was opened")
    return meta, arrays


def _read_text(folder: Path, path: str | os.PathLike) -> bytes:
    if not (folder / META).is_file():
        raise ValueError(f"path: {path} has no {META}, so it is not an index")
    return (folder / META).read_bytes()


def check_file(path: Path, entry: dict, file: BinaryIO | None = None) -> None:
    """ValueError if a file is not the one that its entry in `index.json` describes, by its checksum.

    Args:
        path: of the file.
        entry: in `index.json`.
        file: the file, if it was opened before; it is read from its start.
    """
    if file is None and not path.is_file():
        raise ValueError(f"path: {path} is damaged, it is missing; build the index again")
    with contextlib.nullcontext(file) if file is not None else open(path, "rb") as opened:
        opened.seek(0)
        if _checksum(opened) != entry["crc32"]:
            raise ValueError(f"path: {path} is damaged, its checksum is wrong; build the index again")


def _read_meta(path: Path, text: bytes) -> dict:
    try:
        meta = json.loads(text.decode("utf-8"))
        check_fields(meta, {"format": int, "files": dict}, META)
        for name, entry in meta["files"].items():
            check_name(name, f"{META}, files")
            what = f"{META}, {name}"
            check_fields(entry, {"dtype": str, "shape": list, "crc32": int}, what)
            if np.dtype(entry["dtype"]).kind not in _KINDS:
                raise ValueError(f"{what}: dtype {entry['dtype']} is not allowed")
            if not entry["shape"] or not all(type(size) is int and size >= 0 for size in entry["shape"]):
                raise ValueError(f"{what}: shape {entry['shape']} is not allowed")
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:  # numpy reads a dtype as Python code
        raise ValueError(f"path: {path} is damaged: {error}") from error
    return meta


def check_only_index(folder: Path) -> None:
    """ValueError if an index folder also has files that are not the index's, which replacing it would delete."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not any(fnmatch.fnmatchcase(name, own) for own in _NAMES)]
    if foreign:
        raise ValueError(f"path: {folder} also has {', '.join(foreign[:3])}, so it is not overwritten; move it away")


def _map(path: Path, entry: dict, verify: bool) -> np.ndarray:
    dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
    expected = dtype.itemsize * math.prod(shape)  # numpy's product would overflow
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        state = "is missing" if found < 0 else f"has {found} bytes instead of {expected}: it was truncated or changed"
        raise ValueError(f"path: {path} {state}; build the index again")
    if verify:
        check_file(path, entry)
    if not expected:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _checksum(file: BinaryIO) -> int:
    value = 0
    while data := file.read(_READ):
        value = zlib.crc32(data, value)
    return value
