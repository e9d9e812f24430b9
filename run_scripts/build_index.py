"""Build an index from encode.py's output: `python run_scripts/build_index.py --embeddings DIR --output_dir INDEX`."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retrieval.engines import Layout
from retrieval.reading import STDIN, Text, read_texts
from retrieval.shards import read_shards, read_summary, same_texts
from run_scripts.shared import checks, cli
from run_scripts.shared.engines import EngineArguments


@dataclass
class IndexArguments:
    """What is indexed, and which first stages a search may use."""

    embeddings: str = field(metadata={"help": "Folder that encode.py has written, in float32 or float16."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the index, of the engines that keep it in one."}
    )
    collection: str | None = field(
        default=None, metadata={"help": "Name of the index on a server: Qdrant's collection, PostgreSQL's table."}
    )
    size: str | None = field(default=None, metadata={"help": "One of the sizes in that folder. Default: the largest."})
    prefixes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the first stages of a search will read: DIM, DIM:int8 or DIM:binary ..., and DIM:float16 of "
            "qdrant and pgvector, whose later stages read them too. Default: none."
        },
    )
    approximate: list[str] = field(
        default_factory=list,
        metadata={"help": "Graph for an approximate first stage, DIM:NAME, for example 64:HNSW32; FAISS' if local."},
    )
    with_texts: bool = field(default=True, metadata={"help": "Keep the texts, so that search.py can show them."})
    engine_options: str | None = field(
        default=None,
        metadata={
            "help": "Settings of a new collection of a Qdrant server, as JSON or YAML: shard_number, "
            "replication_factor, write_consistency_factor, on_disk_payload, on_disk."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the index, instead of completing it."})


def main(argv=None) -> None:
    """Parse, check, build."""
    with cli.user_errors():
        args, where = cli.Parser((IndexArguments, EngineArguments)).parse(argv)
        where.check()
        place = _place(args, where)
        made = read_summary(Path(args.embeddings))
        size = args.size or made["sizes"][-1]
        checks.check_sizes([size], "size")
        layout = _layout(args, made, size)
        texts = _texts(args.embeddings, made) if args.with_texts else None
        engine = where.open(place, args.engine_options)
        try:
            engine.create(layout, args.overwrite)
            progress = Progress(made["rows"])
            new = engine.add(read_shards(Path(args.embeddings), size), texts, progress)
            progress.bar.close()
            count = engine.count()
        finally:
            engine.close()
    print(f"{count} vectors of {layout.width} dimensions in {place}, {new} of them new")
    print(f'Search: python run_scripts/search.py {shlex.quote(place)} "your question"{where.flags()}')


class Progress:
    """The bar of the vectors that are added; in a log, it would be more lines before an error."""

    def __init__(self, total: int):
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="vector", desc="Adding", disable=not sys.stderr.isatty())

    def __call__(self, rows: int) -> None:
        self.bar.update(rows)


def _place(args: IndexArguments, where: EngineArguments) -> str:
    """The folder or name of the index."""
    wanted, other = ("collection", "output_dir") if where.has_server() else ("output_dir", "collection")
    place = getattr(args, wanted)
    if not place or getattr(args, other) is not None:
        kind = "a name on the server" if where.has_server() else "a folder"
        raise ValueError(f"{wanted}: the engine {where.engine} needs {kind} by --{wanted}, and no --{other}")
    return place


def _layout(args: IndexArguments, made: dict, size: str) -> Layout:
    """What is stored of one size of the embeddings."""
    folder = args.embeddings
    if made["precision"] not in ("float32", "float16"):
        raise ValueError(f"embeddings: {folder} holds {made['precision']} vectors; encode in float32 or float16")
    if made.get("similarity", "cosine") != "cosine":
        raise ValueError(f"embeddings: {folder} is of a model that compares by dot product; an index has cosines only")
    if size not in made["sizes"]:
        raise ValueError(f"size: {size} is not in {folder}, which has {', '.join(made['sizes'])}")
    prefixes = tuple(_prefix(text) for text in args.prefixes)
    graphs = tuple(_graph(text) for text in args.approximate)
    return Layout(int(size.split("x")[1]), prefixes, graphs, describe(made, size))


def describe(made: dict, size: str) -> dict:
    """How queries must be embedded."""
    num_layers, dim = map(int, size.split("x"))
    names = {"name": made["model_name_or_path"], "weights": made["weights"], "max_length": made["max_length"]}
    more = {name: made[name] for name in ("pooling", "config", "tokenizer", "prompt") if name in made}
    return names | more | {"num_layers": num_layers, "dim": dim}


def _texts(folder: str, made: dict) -> Iterator[str]:
    """The texts of the embeddings; what cannot be read is refused at once, what has changed when it is read."""
    if made["input"] == STDIN:
        raise ValueError("with_texts: standard input cannot be read twice; pass --with_texts false")
    texts = read_texts(made["input"], made["text_column"], made["id_column"])
    return same_texts(Path(folder), (item for item in texts if isinstance(item, Text)))


def _prefix(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"([0-9]{1,9})(?::(\w+))?", text)
    if match is None:
        raise ValueError(f"prefixes: {text!r} is not DIM or DIM:PRECISION, for example 32 or 384:binary")
    return int(match[1]), match[2] or "float32"


def _graph(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"([0-9]{1,9}):(.+)", text)
    if match is None:
        raise ValueError(f"approximate: {text!r} is not DIM:NAME, for example 64:HNSW32")
    return int(match[1]), match[2]


if __name__ == "__main__":
    main()
