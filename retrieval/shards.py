"""Embeddings in shards: each appears complete, and is not computed again while its texts are the same."""

import itertools
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from .checking import Kinds, check_fields
from .reading import Malformed, Text

FORMATS = ("npy", "parquet")
SETTINGS, SUMMARY, DONE, IDS = "settings.json", "embeddings.json", "done", "ids"


@dataclass(frozen=True)
class Shard:
    """Texts whose embeddings are in files of their own.

    Args:
        number: from 0, in the order of the texts.
        texts: without titles, which are not embedded apart from the text.
    """

    number: int
    texts: list[Text]

    @cached_property
    def key(self) -> int:
        """Checksum of the texts and their ids."""
        value = 0
        for item in self.texts:
            value = zlib.crc32(f"{item.id}\0{item.text}\0".encode(), value)
        return value


@dataclass(frozen=True)
class Store:
    """The shards in a folder. Several processes and machines may write different shards at the same time.

    Args:
        folder: gets `SIZE/00000.npy` and `ids/00000.json`, or `SIZE/00000.parquet` with ids.
        sizes: names of the sizes.
        format: `npy` or `parquet`.
    """

    folder: Path
    sizes: Sequence[str]
    format: str

    def is_done(self, number: int, key: int, checksums: bool = True) -> bool:
        """Whether a shard is complete.

        Args:
            number: of the shard.
            key: checksum of its texts.
            checksums: whether to compare the checksums of its files too, or only their sizes, which reads no file.
        """
        marker = self._marker(number)
        look = _states if checksums else _lengths
        try:
            done = check_fields(
                json.loads(marker.read_text(encoding="utf-8")), {"crc32": int, "files": dict}, marker.name
            )
            known = done["files"] if checksums else {name: state[0] for name, state in done["files"].items()}
            return done["crc32"] == key and known == look(_shard_files(self.folder, number, self.sizes, self.format))
        except (OSError, ValueError, RecursionError, TypeError, LookupError):  # of a damaged marker: it is made again
            return False

    def find_missing(self, keys: Sequence[int]) -> list[int]:
        """The numbers of the shards that are not complete; `keys` are the checksums of the texts of all shards."""
        return [number for number, key in enumerate(keys) if not self.is_done(number, key, checksums=False)]

    def write(self, shard: Shard, vectors: dict[str, np.ndarray]) -> None:
        """Write the embeddings of a shard, {size: (len(shard.texts), dim)}; its marker is the last file."""
        files, marker = _shard_files(self.folder, shard.number, self.sizes, self.format), self._marker(shard.number)
        marker.unlink(missing_ok=True)
        (self.folder / SUMMARY).unlink(missing_ok=True)  # until everything is done again, the folder is not complete
        _write_shard(files, shard.texts, vectors, self.format)
        _write_json(marker, {"rows": len(shard.texts), "crc32": shard.key, "files": _states(files)})

    def _marker(self, number: int) -> Path:
        return self.folder / DONE / f"{number:05d}.json"


@dataclass
class Corpus:
    """What was read, over all processes and parts.

    Args:
        rows: number of texts.
        empty: how many of them are empty.
        skipped: [line, reason] of each malformed line.
        keys: checksum of the texts of each shard.
    """

    rows: int = 0
    empty: int = 0
    skipped: list[list] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


def check_settings(folder: Path, settings: dict) -> None:
    """Record how the embeddings are made; ValueError if the folder has embeddings that were made differently."""
    path = folder / SETTINGS
    if not path.is_file():
        _write_first(path, settings)
    try:
        before = check_fields(json.loads(path.read_text(encoding="utf-8")), {}, SETTINGS)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"output_dir: {path} is damaged: {error}; choose another folder") from error
    for name in settings:
        if before.get(name) != settings[name]:
            raise ValueError(
                f"output_dir: {folder} has embeddings made with {name} {before.get(name)!r}, not {settings[name]!r}; "
                "choose another folder"
            )


def is_ours(folder: Path) -> bool:
    """Whether encode.py may write into a folder: it is absent or empty, or an earlier or simultaneous run's."""
    if not folder.is_dir() or (folder / SETTINGS).is_file():
        return True
    return all(path.name.startswith(f".{SETTINGS}.") for path in folder.iterdir())


def encode_shards(
    texts: Iterable[Text | Malformed],
    encode: Callable[[list[str]], dict[str, np.ndarray]],
    folder: Path,
    sizes: Sequence[str],
    shard_size: int,
    format: str,
    process: int = 0,
    processes: int = 1,
    on_error: str = "stop",
    progress: Callable[[int, bool], None] = lambda rows, is_new: None,
) -> Corpus:
    """Write this process's shards: every `processes`-th shard, starting from the `process`-th.

    Args:
        texts: in the same order in every process and run.
        encode: from texts to a (len(texts), dim) array per size, by name.
        folder, sizes, format: see `Store`.
        shard_size: texts per shard.
        process: number of this process, from 0.
        processes: number of processes.
        on_error: `stop` with a ValueError at the first malformed line, or `skip` it.
        progress: called for each finished shard with its rows, and whether they were encoded now.

    Returns:
        What all processes have read.

    Raises:
        ValueError: a line is malformed and `on_error` is `stop`.
    """
    store = Store(folder, sizes, format)

    def make(shard: Shard) -> None:
        store.write(shard, encode([item.text for item in shard.texts]))
        progress(len(shard.texts), True)

    return make_shards(texts, make, store, shard_size, process, processes, on_error, progress)


def make_shards(
    texts: Iterable[Text | Malformed],
    make: Callable[[Shard], None],
    store: Store,
    shard_size: int,
    process: int = 0,
    processes: int = 1,
    on_error: str = "stop",
    progress: Callable[[int, bool], None] = lambda rows, is_new: None,
) -> Corpus:
    """Call `make` for each shard of this process that is not complete, and `progress` for the others.

    See `encode_shards` for the arguments. `make` may return before the shard is written.
    """
    corpus = Corpus()
    good = _good(texts, on_error, corpus.skipped)
    while items := list(itertools.islice(good, shard_size)):
        shard = Shard(len(corpus.keys), items)
        corpus.rows += len(items)
        corpus.empty += sum(not item.text.strip() for item in items)
        corpus.keys.append(shard.key)
        if shard.number % processes != process:
            continue
        if store.is_done(shard.number, shard.key):
            progress(len(items), False)
        else:
            make(shard)
    return corpus


def _shard_files(folder: Path, number: int, sizes: Iterable[str], format: str) -> dict[str, Path]:
    """The files of a shard: of each size, and of its ids unless they are in the same file."""
    files = {size: folder / size / f"{number:05d}.{format}" for size in sizes}
    return files | ({IDS: folder / IDS / f"{number:05d}.json"} if format == "npy" else {})


def _states(files: dict[str, Path]) -> dict[str, list[int]]:
    """Bytes and checksum of each file, by folder and name."""
    contents = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files.values()}
    return {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}


def _lengths(files: dict[str, Path]) -> dict[str, int]:
    return {f"{path.parent.name}/{path.name}": path.stat().st_size for path in files.values()}


def finish(folder: Path, settings: dict, corpus: Corpus) -> None:
    """Delete shards of an earlier, longer input and what killed runs have left, and write the summary.

    All shards must be complete. Several processes may do it at the same time.
    """
    shards = len(corpus.keys)
    for path in itertools.chain.from_iterable((folder / name).glob("*") for name in (*settings["sizes"], IDS, DONE)):
        partial = re.fullmatch(r"\.[0-9]{5,}\.(npy|parquet|json)(\.[0-9a-f]+)?", path.name)
        whole = re.fullmatch(r"([0-9]{5,})\.(npy|parquet|json)", path.name)
        if partial or (whole is not None and int(whole[1]) >= shards):
            path.unlink(missing_ok=True)
    for path in folder.glob(f".{SETTINGS}.*"):
        path.unlink(missing_ok=True)
    summary = {"rows": corpus.rows, "empty": corpus.empty, "shards": shards, "skipped": corpus.skipped}
    _write_json(folder / SUMMARY, settings | summary)


def read_summary(folder: Path) -> dict:
    """The description of the embeddings in a folder; ValueError if they are not complete, or it is damaged."""
    path = folder / SUMMARY
    if not path.is_file():
        raise ValueError(f"embeddings: {folder} has no {SUMMARY}, so it is not complete; let encode.py finish first")
    text_or_none = (str, type(None))
    kinds: dict[str, type | tuple[type, ...]] = {
        **{"rows": int, "shards": int, "sizes": list, "format": str, "precision": str, "model_name_or_path": str},
        **{"weights": int, "max_length": int, "input": str, "text_column": str, "id_column": text_or_none},
    }
    try:
        summary = check_fields(json.loads(path.read_text(encoding="utf-8")), kinds, SUMMARY)
        if summary["format"] not in FORMATS:
            raise ValueError(f"{SUMMARY}: format {summary['format']!r} is not allowed")
        sizes = summary["sizes"]
        # A size is also the name of a folder, and must not lead out of this one.
        if not sizes or not all(isinstance(size, str) and re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) for size in sizes):
            raise ValueError(f"{SUMMARY}: sizes {sizes!r} is not allowed")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"embeddings: {path} is damaged: {error}") from error
    return summary


def same_texts(folder: Path, texts: Iterable[Text]) -> Iterator[str]:
    """The texts that were encoded, from reading them again; ValueError at a shard that was made of others."""
    summary, texts = read_summary(folder), iter(texts)
    changed = ValueError(f"with_texts: {summary['input']} has changed since it was encoded; encode it again")
    kinds: Kinds = {"rows": int, "crc32": int}
    for number in range(summary["shards"]):
        marker = folder / DONE / f"{number:05d}.json"
        try:
            done = check_fields(json.loads(marker.read_text(encoding="utf-8")), kinds, marker.name)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"embeddings: {marker} is missing or damaged; encode it again") from error
        items = list(itertools.islice(texts, done["rows"]))
        if Shard(number, items).key != done["crc32"]:
            raise changed
        yield from (item.text for item in items)
    if next(texts, None) is not None:
        raise changed


def read_shards(folder: Path, size: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and embeddings of one size, shard by shard; ValueError if the folder is not complete or lacks the size."""
    summary = read_summary(folder)
    if size not in summary["sizes"]:
        raise ValueError(f"size: {size} is not in {folder}, which has {', '.join(summary['sizes'])}")
    found = 0
    for number in range(summary["shards"]):
        ids, rows = _read_shard(folder, number, size, summary["format"])
        found += len(ids)
        yield ids, rows
    if found != summary["rows"]:
        raise ValueError(f"embeddings: {folder} has {found} texts instead of {summary['rows']}; encode it again")


def _read_shard(folder: Path, number: int, size: str, format: str) -> tuple[list[str], np.ndarray]:
    files = _shard_files(folder, number, [size], format)
    path = files[size]
    try:
        _check_states(folder / DONE / f"{number:05d}.json", files.values())
        if format == "npy":
            ids = json.loads(files[IDS].read_text(encoding="utf-8"))
            return _checked(path, ids, np.load(path, allow_pickle=False), size)
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["id", "embedding"])
        vectors = table["embedding"].combine_chunks()
        return _checked(path, table["id"].to_pylist(), vectors.flatten().to_numpy().reshape(len(table), -1), size)
    except (ValueError, OSError, EOFError, LookupError, TypeError, RecursionError, NotImplementedError,
            AttributeError) as error:  # fmt: skip
        # What numpy, json and pyarrow raise for files that are missing, cut off or of another kind.
        if str(error).startswith("embeddings: "):
            raise
        reason = " ".join(str(error).split())[:200] or "it is cut off"
        raise ValueError(f"embeddings: {path} cannot be read: {reason}; encode it again") from error


def _check_states(marker: Path, files: Iterable[Path]) -> None:
    """ValueError if the marker of a shard, if there is one, names a file whose bytes are others now."""
    if not marker.is_file():
        return
    done = check_fields(json.loads(marker.read_text(encoding="utf-8")), {}, marker.name)
    known = check_fields(done.get("files", {}), {}, marker.name)
    for path in files:
        ((name, state),) = _states({path.parent.name: path}).items()
        if known.get(name, state) != state:
            raise ValueError(f"embeddings: {path} is damaged, its checksum is wrong; encode it again")


def _checked(path: Path, ids, rows: np.ndarray, size: str) -> tuple[list[str], np.ndarray]:
    """Ids and embeddings of a shard; ValueError unless there is one text id for each row."""
    are_ids = isinstance(ids, list) and all(isinstance(name, str) for name in ids)
    if not are_ids or rows.ndim != 2 or len(ids) != len(rows):
        raise ValueError(f"embeddings: {path} of size {size} is damaged: its ids do not fit its rows; encode it again")
    dim = int(size.split("x")[1])
    if rows.dtype.kind not in "fiu" or (rows.dtype.kind == "f" and rows.shape[1] != dim):
        raise ValueError(
            f"embeddings: {path} is damaged: it has rows of {rows.shape[1]} {rows.dtype}, not of {dim} numbers; "
            "encode it again"
        )
    return ids, rows


def _good(texts: Iterable[Text | Malformed], on_error: str, skipped: list[list]) -> Iterator[Text]:
    for item in texts:
        if not isinstance(item, Malformed):
            yield item._replace(title="")  # titles are not embedded apart from the text
        elif on_error == "stop":
            raise ValueError(
                f"input: line {item.line} is malformed: {item.reason}; --on_error skip leaves malformed lines out, and "
                "finished shards are kept"
            )
        else:
            skipped.append(list(item))


def _write_shard(files: dict[str, Path], shard: list[Text], vectors: dict[str, np.ndarray], format: str) -> None:
    ids = [text.id for text in shard]
    if format == "npy":
        _write_json(files[IDS], ids)
    for size, rows in vectors.items():
        path = files[size]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        if format == "npy":
            with open(partial, "wb") as file:
                np.save(file, rows)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
            pq.write_table(pa.table({"id": ids, "embedding": column}), partial)
        os.replace(partial, path)


def _write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)


def _write_first(path: Path, content) -> None:
    """Write a file, unless another process has written it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(json.dumps(content), encoding="utf-8")
    try:
        os.link(partial, path)  # unlike os.replace, it never replaces a file
    except OSError:  # it is there, or the file system has no hard links
        if not path.exists():
            os.replace(partial, path)
    partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A new name beside a file: another process may be writing the same file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
