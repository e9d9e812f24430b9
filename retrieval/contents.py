"""The files of an index: their names, and whether they fit what `index.json` says."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from .checking import Kinds, check_fields, check_name
from .stages import PRECISIONS
from .store import Writer
from .vectors import prefix

VECTORS, IDS, TEXTS, OFFSETS, GRAPH = "vectors.f32", "ids", "texts.utf8", "text_offsets", "graph.faiss"
# Where each id begins in IDS, if the ids are texts.
ID_OFFSETS = "id_offsets"


def check_contents(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """ValueError unless the fields of `index.json` are those that `build` writes, and the arrays fit them."""
    object_or_none = (dict, type(None))
    kinds: Kinds = {"count": int, "width": int, "model": object_or_none, "prefixes": list, "graph": object_or_none}
    check_fields(meta, kinds, "index")
    count, width = meta["count"], meta["width"]
    if not count or not width:
        raise ValueError(f"index: {count} vectors of {width} dimensions are not allowed")
    expected: dict[str, tuple[np.dtype, tuple[int, ...]]] = {VECTORS: (np.dtype("<f4"), (count, width))}
    for entry in meta["prefixes"]:
        check_fields(entry, {"dim": int, "precision": str, "file": str}, "prefixes")
        dim, precision = entry["dim"], entry["precision"]
        check_prefixes([(dim, precision)], width)
        if check_name(entry["file"], "prefixes") != file_of(dim, precision):
            raise ValueError(f"prefixes: the file {entry['file']} is not {file_of(dim, precision)}")
        sample = prefix(np.zeros((1, dim), np.float32), dim, precision)
        expected[entry["file"]] = sample.dtype, (count, *sample.shape[1:])
    if meta["graph"] is not None:
        check_fields(meta["graph"], {"dim": int, "spec": str}, "graph")
        expected[GRAPH] = np.dtype("u1"), arrays[GRAPH].shape if GRAPH in arrays else ()
    if IDS in arrays and ID_OFFSETS not in arrays:
        expected[IDS] = arrays[IDS].dtype, (count,)
    for name, offsets in ((IDS, ID_OFFSETS), (TEXTS, OFFSETS)):
        if offsets in arrays or (name == TEXTS and TEXTS in arrays):
            expected[name] = np.dtype("u1"), arrays[name].shape[:1] if name in arrays else ()
            expected[offsets] = np.dtype("<i8"), (count + 1,)
    for name, (dtype, shape) in expected.items():
        if name not in arrays:
            raise ValueError(f"files: {name} is missing")
        if (arrays[name].dtype, arrays[name].shape) != (dtype, shape):
            raise ValueError(f"files: {name} is {arrays[name].dtype} {arrays[name].shape}, not {dtype} {shape}")
    for name, offsets in ((IDS, ID_OFFSETS), (TEXTS, OFFSETS)):
        ends = arrays.get(offsets)
        if ends is not None and (ends[0] != 0 or ends[-1] != len(arrays[name]) or (np.diff(ends) < 0).any()):
            raise ValueError(f"files: {offsets} does not fit {name}")


def read_ids(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """The (count,) ids of checked arrays, texts as Python objects; None if they are the rows' numbers.

    An array of fixed-width texts would have room for the longest id in each row.
    """
    if IDS not in arrays or ID_OFFSETS not in arrays:
        return np.asarray(arrays[IDS]) if IDS in arrays else None
    whole, ends = arrays[IDS].tobytes(), arrays[ID_OFFSETS].tolist()
    ids = np.empty(len(ends) - 1, dtype=object)
    try:
        ids[:] = [whole[first:last].decode("utf-8") for first, last in itertools.pairwise(ends)]
    except UnicodeDecodeError as error:
        raise ValueError(f"files: {IDS} is not UTF-8: {error}") from error
    return ids


def append_ids(writer: Writer, ids: Sequence[str] | Sequence[int], count: int) -> None:
    """Write the ids of `count` vectors; ValueError unless they are as many distinct texts or whole numbers."""
    if len(ids) != count:
        raise ValueError(f"ids: {len(ids)} are given for {count} vectors")
    if len(set(ids)) != count:
        name = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"ids: {name!r} appears twice; ids must be distinct")
    if all(isinstance(name, str) for name in ids):
        append_texts(writer, cast("Sequence[str]", ids), count, "ids", IDS, ID_OFFSETS)
        return
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise ValueError("ids: they are not allowed; use texts only, or whole numbers only")
    writer.append(IDS, array)


def append_texts(writer: Writer, texts: Iterable[str], count: int, argument: str, name: str, offsets: str) -> None:
    """Write one text for each of `count` vectors into the file `name`, and where each begins into `offsets`."""
    ends = [0]
    for text in texts:
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{argument}: item {len(ends) - 1} has half of a surrogate pair, which no file in UTF-8 can hold"
            ) from error
        writer.append(name, np.frombuffer(encoded, dtype=np.uint8))
        ends.append(ends[-1] + len(encoded))
    if len(ends) - 1 != count:
        raise ValueError(f"{argument}: {len(ends) - 1} are given for {count} vectors")
    writer.append(offsets, np.array(ends, dtype="<i8"))


def check_prefixes(
    prefixes: Sequence[tuple[int, str]],
    width: int,
    argument: str = "prefixes",
    allowed: Sequence[str] = PRECISIONS,
) -> None:
    """ValueError if vectors of this width have no such first dimensions, or the precision is unknown."""
    for dim, precision in prefixes:
        if not 1 <= dim <= width:
            raise ValueError(f"{argument}: {dim} is not allowed; the vectors have 1 to {width} dimensions")
        if precision not in allowed:
            raise ValueError(f"{argument}: {precision!r} is unknown; choose one of {', '.join(allowed)}")


def file_of(dim: int, precision: str) -> str:
    """The file of the first `dim` dimensions in a precision."""
    return f"prefix-{dim}.{precision}"
