"""Search an index: `python run_scripts/search.py INDEX ["query" ...] [--flag value]`; without a query, it prompts."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retrieval import FunnelIndex, Stage, parse_stages
from retrieval.checking import check_fields
from retrieval.stages import check_stages
from run_scripts.shared import checks, cli, remote_code

if TYPE_CHECKING:
    from modeling_2dmse import TwoDMSEModel

# Characters shown of a text.
_SHOWN = 160


@dataclass
class SearchArguments:
    """How an index is searched."""

    k: int | None = field(
        default=None, metadata={"help": "Results per query. Default: 10, or all if the index has fewer."}
    )
    stages: str | None = field(
        default=None,
        metadata={"help": "DIM:KEEP[:PRECISION],... Default: one exact stage at the full width."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The index's model, if it has moved since the index was built."}
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
        (args,) = cli.Parser((SearchArguments,), usage='%(prog)s INDEX ["query" ...] [--flag value ...]').parse(argv)
        if not words:
            raise ValueError("index: name the folder of an index as the first argument")
        index = FunnelIndex.open(words.pop(0))
        made = index.meta["model"]
        if not made:
            raise ValueError(f"index: {index.path} does not name the model that made it; build it with build_index.py")
        check_fields(made, {"name": str, "weights": int, "num_layers": int, "max_length": int}, f"{index.path}, model")
        args.k = min(10, len(index)) if args.k is None else args.k
        stages = parse_stages(args.stages) if args.stages is not None else [Stage(index.width, args.k)]
        check_stages(stages, args.k, len(index), index.width)
        name = args.model_name_or_path or made["name"]
        checks.check_model(name)

        from run_scripts.shared import models

        model = models.load_encoder(name, trust_remote_code=args.trust_remote_code)
        for part, value in models.describe(model).items():
            if made.get(part, value) != value:
                raise ValueError(f"model_name_or_path: the {part} are not those that made {index.path}")
        if made["num_layers"] < model.num_layers:
            model = model.truncate(made["num_layers"])
        model = models.to_device(model)
        for query in words or ask():
            print(answer(index, model, query, args, stages), flush=True)


def ask():
    """Yield the lines that the user types, until there are no more."""
    while True:
        try:
            line = input("query> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"query: standard input has a line that is not UTF-8: {error}") from error
        if line.strip():
            yield line


def answer(index: FunnelIndex, model: TwoDMSEModel, query: str, args: SearchArguments, stages) -> str:
    """The results of a query, a line each, and the time that each stage took."""
    made = index.meta["model"]
    start = time.perf_counter()
    vector = model.encode(query, dim=index.width, prompt_name=args.prompt_name, max_length=made["max_length"])
    encoded = time.perf_counter() - start
    scores, ids = index.search(vector, args.k, stages)
    lines = [f"{query}"]
    for place, (score, name) in enumerate(zip(scores, ids, strict=True), start=1):
        text = " ".join(index.text(name).split()) if index.has_texts else ""
        lines.append(f"{place:>3}  {score:.4f}  {name}  {text[:_SHOWN]}")
    taken = [f"{name} {1000 * seconds:.2f} ms" for name, seconds in zip(stages, index.seconds, strict=True)]
    return "\n".join([*lines, f"     encoding {1000 * encoded:.1f} ms, {', '.join(taken)}\n"])


if __name__ == "__main__":
    main()
