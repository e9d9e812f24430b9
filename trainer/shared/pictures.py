"""Opening pictures: a damaged one is an error that names it."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class PictureError(ValueError):
    """A picture cannot be read; the message is one line for the user."""

    @property
    def line(self) -> str:
        """The message, without the traceback that a DataLoader's worker process puts before it."""
        return str(self).strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2]


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Around the decoding of a picture: what its libraries raise for a damaged one becomes a PictureError.

    Args:
        place: the argument, a colon and what names the picture.
    """
    from PIL import Image  # an optional library

    kinds = (AttributeError, EOFError, LookupError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError,
             ValueError, struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip
    try:
        yield
    except PictureError:
        raise
    except kinds as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PictureError(f"{place} cannot be read as a picture: {reason}") from error


def check_kind(value: Any, place: str, root: str = "") -> None:
    """PictureError if a picture has no header of one; whether the rest is whole shows when it is decoded.

    Args:
        value: a path inside `root`, or a dictionary with a path or bytes, as `datasets` has it undecoded.
        place: the argument, a colon and what names the picture.
        root: the folder that a path starts from.
    """
    from PIL import Image

    with reading(place), Image.open(source(value, root)):
        pass


def source(value: Any, root: str = "") -> Any:
    """What PIL opens: a path, or the bytes as a file."""
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    return os.path.join(root, value) if isinstance(value, str) else value


def decode_when_read(table: Dataset, argument: str) -> Dataset:
    """A table whose column `image` is decoded when a row is read, with a PictureError for a damaged picture.

    Args:
        table: with a column `image` of `datasets.Image`. If it names files, the header of each is checked here.
        argument: the name that errors give to the table.
    """
    import datasets  # takes a second; the scripts catch PictureError before they need it

    table = table.cast_column("image", datasets.Image(decode=False))

    def decode(rows: dict[str, list]) -> dict[str, list]:
        if "image" not in rows:  # another column is read
            return rows
        return rows | {"image": [_decode(value, argument) for value in rows["image"]]}

    for value in table["image"]:
        if value is None or value["bytes"] is not None:  # a dataset of the Hub, which may be large
            break
        check_kind(value, f"{argument}: {value['path']}")
    return table.with_transform(decode)


def _decode(value: dict[str, Any] | None, argument: str) -> Any:
    import datasets

    with reading(f"{argument}: {(value or {}).get('path') or 'a picture'}"):
        return datasets.Image().decode_example(value)
