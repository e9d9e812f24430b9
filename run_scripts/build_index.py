"""Build an index from encode.py's output: `python run_scripts/build_index.py --embeddings DIR --output_dir INDEX`."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from retrieval import FunnelIndex
from retrieval.reading import STDIN, Text, read_texts
from retrieval.shards import read_shards, read_summary
from run_scripts.shared import checks, cli


@dataclass
class IndexArguments:
    """What is indexed, and which first stages a search may use."""

    embeddings: str = field(metadata={"help": "Folder that encode.py has written, in float32 or float16."})
    output_dir: str = field(metadata={"help": "Folder for the index."})
    size: str | None = field(default=None, metadata={"help": "One of the sizes in that folder. Default: the largest."})
    prefixes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the first stages of a search will read: DIM, DIM:int8 or DIM:binary ... Default: none."
        },
    )
    approximate: str | None = field(
        default=None,
        metadata={"help": "FAISS graph for an approximate first stage, DIM:NAME, for example 64:HNSW32."},
    )
    with_texts: bool = field(default=True, metadata={"help": "Keep the texts, so that search.py can show them."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the index in output_dir."})


def main(argv=None) -> None:
    """Parse, check, build."""
    with cli.user_errors():
        (args,) = cli.Parser((IndexArguments,)).parse(argv)
        folder = Path(args.embeddings)
        made = read_summary(folder)
        if made["precision"] not in ("float32", "float16"):
            raise ValueError(f"embeddings: {folder} holds {made['precision']} vectors; encode in float32 or float16")
        if made.get("similarity", "cosine") != "cosine":
            raise ValueError(
                f"embeddings: {folder} is of a model that compares by dot product; an index has cosines only"
            )
        size = args.size or made["sizes"][-1]
        checks.check_sizes([size], "size")
        prefixes = [_prefix(text) for text in args.prefixes]
        approximate = None
        if args.approximate is not None:
            match = re.fullmatch(r"([0-9]{1,9}):(.+)", args.approximate)
            if match is None:
                raise ValueError(f"approximate: {args.approximate!r} is not DIM:NAME, for example 64:HNSW32")
            approximate = (int(match[1]), match[2])
        ids: list[str] = []

        def blocks():
            for names, rows in read_shards(folder, size):
                ids.extend(names)
                yield rows

        index = FunnelIndex.build(
            blocks(),
            args.output_dir,
            prefixes,
            ids=ids,
            texts=_texts(made, ids) if args.with_texts else None,
            model=describe(made, size),
            approximate=approximate,
            overwrite=args.overwrite,
        )
    print(f"{len(index)} vectors of {index.width} dimensions in {args.output_dir}")
    print(f'Search: python run_scripts/search.py {args.output_dir} "your question"')


def describe(made: dict, size: str) -> dict:
    """How queries must be embedded."""
    num_layers, dim = map(int, size.split("x"))
    names = {"name": made["model_name_or_path"], "weights": made["weights"], "max_length": made["max_length"]}
    more = {name: made[name] for name in ("pooling", "config", "tokenizer") if name in made}
    return names | more | {"num_layers": num_layers, "dim": dim}


def _texts(made: dict, ids: list[str]):
    """The texts of the ids, which are read after the vectors, when all ids are known."""
    if made["input"] == STDIN:
        raise ValueError("with_texts: standard input cannot be read twice; pass --with_texts false")
    texts = read_texts(made["input"], made["text_column"], made["id_column"])

    def each():
        good = (item for item in texts if isinstance(item, Text))
        for position, item in enumerate(good):
            if position >= len(ids) or item.id != ids[position]:
                raise ValueError(f"with_texts: {made['input']} has changed since it was encoded; encode it again")
            yield item.text

    return each()


def _prefix(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"([0-9]{1,9})(?::(\w+))?", text)
    if match is None:
        raise ValueError(f"prefixes: {text!r} is not DIM or DIM:PRECISION, for example 32 or 384:binary")
    return int(match[1]), match[2] or "float32"


if __name__ == "__main__":
    main()
