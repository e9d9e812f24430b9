"""The file of finished runs: several processes, days and machines may add to it."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None

from retrieval.checking import Kinds, check_fields
from run_scripts.shared import output

# Entries of a row that identify its run.
KEYS = ("train", "method", "size", "learning_rate", "seed")


class Store:
    """
    `{"settings": {...}, "search": [...], "rows": [...], "tried": [...]}` in a file.

    Args:
        path: of the file.
        lock: a file that keeps two processes from writing at the same time.
        train: name of the training data, the key of its settings and runs.
        settings: what all runs of this training data share.

    Raises:
        ValueError: the file was made with other settings, or is not such a file.
    """

    def __init__(self, path: str, lock: Path, train: str, settings: dict):
        self.path, self.lock, self.train = Path(path), lock, train
        with claim(lock, wait=True):
            content = self._read()
            found = content["settings"].setdefault(train, settings)
            other = [name for name in settings if found.get(name) != settings[name]]
            if other:
                name = other[0]
                raise ValueError(
                    f"results_file: {path} holds runs on {train} with {name} {found.get(name)}, not {settings[name]}; "
                    "name another file"
                )
            self._write(content)

    def find(self, kind: str, **key) -> dict | None:
        """A finished run of `search` or `rows`, None if there is none."""
        wanted = self._key({"train": self.train, **key})
        return next((row for row in self._read()[kind] if self._key(row) == wanted), None)

    def rows(self) -> list[dict]:
        """The finished runs of the comparison, of all training data."""
        return self._read()["rows"]

    def add(self, kind: str, row: dict) -> None:
        """Write a finished run; in `rows` it replaces one at another learning rate, which is no longer the best."""
        row = {"train": self.train, **row}
        with claim(self.lock, wait=True):
            content = self._read()
            names = [name for name in KEYS if kind == "search" or name != "learning_rate"]
            content[kind] = [old for old in content[kind] if self._key(old, names) != self._key(row, names)]
            content[kind].append(row)
            self._write(content)

    def search(self) -> list[dict]:
        """The finished runs from which learning rates are chosen, of all training data."""
        return self._read()["search"]

    def note_tried(self, entries: list[dict]) -> None:
        """Write which settings were tried for each method on this training data; it replaces what was there."""
        with claim(self.lock, wait=True):
            content = self._read()
            others = [old for old in content["tried"] if old["train"] != self.train]
            content["tried"] = others + [{"train": self.train, **entry} for entry in entries]
            self._write(content)

    @staticmethod
    def _key(row: dict, names: Sequence[str] = KEYS) -> tuple:
        return tuple(row.get(name) for name in names)

    def _read(self) -> dict:
        if not self.path.is_file():
            return {"settings": {}, "search": [], "rows": [], "tried": []}
        try:
            kinds: Kinds = {"settings": dict, "search": list, "rows": list}
            content = check_fields(json.loads(self.path.read_text(encoding="utf-8")), kinds, "the file")
            parts = {name: content[name] for name in kinds} | {"tried": content.get("tried", [])}
            for name in ("search", "rows", "tried"):
                if not all(isinstance(row, dict) for row in parts[name]):
                    raise ValueError(f"{name} has an entry that is not an object")
            return parts
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"results_file: {self.path} is not a file of this script: {error}") from error

    def _write(self, content: dict) -> None:
        os.makedirs(self.path.parent, exist_ok=True)
        output.write_json(self.path, content)


@contextlib.contextmanager
def claim(path: Path, wait: bool = False):
    """Whether this process holds the file's lock, which is released at the end or when the process dies."""
    os.makedirs(path.parent, exist_ok=True)
    with open(path, "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield True
        except BlockingIOError:
            yield False
