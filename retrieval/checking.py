"""Checks of the JSON files of indexes and embeddings, which may come from anywhere."""

from collections.abc import Mapping
from typing import Any

# What `isinstance` takes.
Kinds = Mapping[str, type | tuple[type, ...]]


def check_name(name: Any, what: str) -> str:
    """The name of a file or folder; ValueError unless it stays inside the folder that it is in."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"{what}: {name!r} is not allowed; use the name of a file, without a folder")
    return name


def check_fields(entry: Any, kinds: Kinds, what: str) -> dict:
    """An object of a JSON file; ValueError if it is none, or one of its fields is missing or of another type.

    Args:
        entry: the object.
        kinds: the type or types of each field. Whole numbers must not be negative; true and false are none.
        what: the file and the place in it, for the message.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{what}: {entry!r} is not allowed; it must be an object")
    for name, kind in kinds.items():
        if name not in entry:
            raise ValueError(f"{what}: {name} is missing")
        value = entry[name]
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not isinstance(value, kind) or (kind is int and not is_count):
            raise ValueError(f"{what}: {name} {value!r} is not allowed")
    return entry
