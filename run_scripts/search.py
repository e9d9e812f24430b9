"""Search an index: `python run_scripts/search.py INDEX ["query" ...] [--flag value]`.

Without a query, it asks for one after another, until `exit`, `quit` or the end of the input.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from retrieval import Stage, parse_stages
from retrieval.checking import check_fields
from retrieval.engines import Engine
from run_scripts.shared import checks, cli, remote_code
from run_scripts.shared.engines import EngineArguments

if TYPE_CHECKING:
    from modeling_2dmse import TwoDMSEModel

# Characters shown of a text.
_SHOWN = 160
# What ends the interactive mode; the first is the word that is told.
_ENDS = ("exit", "quit", "q", ":q", "exit()", "quit()")


@dataclass
class SearchArguments:
    """How an index is searched."""

    k: int | None = field(
        default=None,
        metadata={"help": "Results per query. Default: what the last of --stages keeps; without stages 10, or all if "
                  "the index has fewer."},
    )  # fmt: skip
    stages: str | None = field(
        default=None,
        metadata={"help": "DIM:KEEP[:PRECISION],... Default: one exact stage at the full width."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The index's model, if it has moved since the index was built."}
    )
    query_size: str | None = field(
        default=None,
        metadata={
            "help": "LAYERSxDIM that queries are embedded at, for example 2x384 to find texts of 6x384. Default: the "
            "index's size. finetune.py --cross_size_weight trains a model for it."
        },
    )
    prompt_name: str | None = field(default=None, metadata={"help": "The model's prompt to put before each query."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, open, search."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = []
    while argv and not argv[0].startswith("-"):
        words.append(argv.pop(0))
    with cli.user_errors():
        usage = '%(prog)s INDEX ["query" ...] [--flag value ...]'
        args, where = cli.Parser((SearchArguments, EngineArguments), usage=usage).parse(argv)
        if not words:
            raise ValueError("index: name the folder of an index as the first argument")
        if args.query_size is not None:
            checks.check_sizes([args.query_size], "query_size")
        engine = where.open(words.pop(0))
        try:
            engine.open()
            stages = choose_stages(engine, args)
            model = load_model(engine, args)
            for query in words or ask():
                print(answer(engine, model, query, args, stages), flush=True)
        finally:
            engine.close()


def choose_stages(engine: Engine, args: SearchArguments) -> list[Stage]:
    """The stages that the index is searched by; ValueError if it cannot be. Sets `args.k` to the default."""
    if engine.size is None:
        raise ValueError(f"index: {engine.place} is not complete; run build_index.py again, which adds the rest")
    width = engine.layout.width
    dim = width if args.query_size is None else int(args.query_size.split("x")[1])
    if dim > width:
        raise ValueError(f"query_size: {args.query_size} is not allowed; the index has {width} dimensions")
    stages = parse_stages(args.stages) if args.stages is not None else None
    if args.k is None:
        args.k = max(1, min(stages[-1].keep if stages else 10, engine.size))  # a stage of 0 is refused below
    stages = stages or [Stage(dim, args.k)]
    if args.query_size is not None and max(stage.dim for stage in stages) > dim:
        raise ValueError(f"stages: {args.stages} needs more dimensions than queries of --query_size {args.query_size}")
    engine.check_stages(stages, args.k)
    return stages


def load_model(engine: Engine, args: SearchArguments) -> TwoDMSEModel:
    """The model that made the index, with as many layers as queries need; ValueError if it is another one."""
    made = engine.layout.model
    if not made:
        raise ValueError(f"index: {engine.place} does not name the model that made it; build it with build_index.py")
    check_fields(made, {"name": str, "weights": int, "num_layers": int, "max_length": int}, f"{engine.place}, model")
    name = args.model_name_or_path or made["name"]
    checks.check_model(name)

    from run_scripts.shared import models

    model = models.load_encoder(name, trust_remote_code=args.trust_remote_code)
    for part, value in models.describe(model).items():
        if made.get(part, value) != value:
            raise ValueError(f"model_name_or_path: {name} does not have the {part} that made {engine.place}")
    num_layers = made["num_layers"] if args.query_size is None else int(args.query_size.split("x")[0])
    if num_layers > model.num_layers:
        raise ValueError(f"query_size: {args.query_size} is not allowed; the model has {model.num_layers} layers")
    return models.to_device(model.truncate(num_layers) if num_layers < model.num_layers else model)


def ask():
    """Yield the lines that the user types, until `exit`, `quit` or the end of the input."""
    if sys.stdin.isatty():
        print("Type a query, or exit to end.", flush=True)
    while True:
        try:
            line = input("query> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"query: standard input has a line that is not UTF-8: {error}") from error
        if line.strip().lower() in _ENDS:
            return
        if line.strip():
            yield line


def answer(engine: Engine, model: TwoDMSEModel, query: str, args: SearchArguments, stages: list[Stage]) -> str:
    """The results of a query, a line each, and the time that each stage took."""
    width, made = engine.layout.width, engine.layout.model or {}
    dim = width if args.query_size is None else int(args.query_size.split("x")[1])
    start = time.perf_counter()
    vector = model.encode(query, dim=dim, prompt_name=args.prompt_name, max_length=made["max_length"])
    encoded = time.perf_counter() - start
    vector = np.pad(vector, (0, width - dim))  # no stage reads dimensions that the query does not have
    scores, ids = engine.search(vector[None], args.k, stages)
    lines = [f"{query}"]
    for place, (score, name, text) in enumerate(zip(scores[0], ids[0], engine.texts(ids[0]), strict=True), start=1):
        lines.append(f"{place:>3}  {score:.4f}  {_plain(name)}  {' '.join(_plain(text).split())[:_SHOWN]}")
    names = stages if len(stages) == len(engine.seconds) else [",".join(map(str, stages))]
    taken = [f"{name} {1000 * seconds:.2f} ms" for name, seconds in zip(names, engine.seconds, strict=True)]
    return "\n".join([*lines, f"     encoding {1000 * encoded:.1f} ms, {', '.join(taken)}\n"])


def _plain(text: object) -> str:
    """A text without characters that control a terminal, for example line breaks and colours."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", str(text))


if __name__ == "__main__":
    main()
