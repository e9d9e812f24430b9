"""What each name of benchmark.py measures, the data it is measured on, and the machine."""

import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset

from run_scripts.shared.quickstart import python_docs
from trainer.data import check_table
from trainer.evaluation import RetrievalData, StsData, load_beir, load_sts, name_apart, task_from_table
from trainer.shared.arguments import cpu_has_bf16
from trainer.shared.tables import read_table

from .encode import encode_cost
from .engines import engines_cost
from .funnel import funnel_cost, funnel_quality
from .gpu import gpu_cost, sources_of
from .grid import grid_cost
from .growth import growth_cost
from .host import host_cost
from .m3 import m3_cost
from .memory import memory_cost
from .smae import smae_cost
from .startup import startup_cost
from .step import step_cost
from .train import train_cost


def read_rows(args) -> Dataset:
    """The rows of train_file, or pairs of Python's documentation."""
    table = check_table(read_table(args.train_file)) if args.train_file else python_docs()[0]
    if "score" in table.column_names:
        raise ValueError(f"train_file: {args.train_file} must hold anchors and positives, not scores")
    return table


def read_tasks(args) -> list[StsData | RetrievalData]:
    """The tasks of sts_files and beir_dirs, or search in Python's documentation."""
    tasks = [load_sts(path) for path in args.sts_files or []]
    tasks += [load_beir(folder) for folder in args.beir_dirs or []]
    tasks = name_apart(tasks, [*(args.sts_files or []), *(args.beir_dirs or [])])
    return tasks or [task_from_table("python-docs", python_docs()[1])]


def read_texts(args) -> list[str]:
    """The lines of `--texts`, or sentences and documents of the tasks in equal parts."""
    if args.texts:
        lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
        sources = [[line for line in lines if line.strip()]]
    else:
        sources = [
            list(task.corpus.values()) if hasattr(task, "corpus") else [*task.sentence1, *task.sentence2]
            for task in read_tasks(args)
        ]
    share = -(-args.max_texts // len(sources))
    return [text for source in sources for text in source[:share]]


def _encode(args) -> list[dict]:
    tasks = [load_sts(path) for path in args.sts_files or []]
    with tempfile.TemporaryDirectory() as folder:
        return encode_cost(args, read_texts(args), tasks, folder)


def _funnel_quality(args) -> list[dict]:
    return funnel_quality(args, [task for task in read_tasks(args) if isinstance(task, RetrievalData)])


def _gpu(args) -> list[dict]:
    if not torch.cuda.is_available():
        raise ValueError("benchmark: gpu needs a CUDA GPU, which this machine does not have; host needs none")
    return gpu_cost(args, sources_of(args, read_texts(args), read_tasks(args)), read_rows(args))


def _host(args) -> list[dict]:
    rows = read_rows(args)
    return host_cost(args, read_texts(args), rows) + step_cost(args, rows)


MEASURES = {
    "train": lambda args: train_cost(args, read_rows(args)),
    "encode": _encode,
    "grid": lambda args: grid_cost(args, read_tasks(args)),
    "startup": startup_cost,
    "smae": lambda args: smae_cost(args.sizes, args.runs),
    "memory": lambda args: memory_cost(args.model_name_or_path, args.sizes, args.runs, args.trust_remote_code),
    "growth": growth_cost,
    "funnel": lambda args: funnel_cost(args, read_texts(args)),
    "funnel-quality": _funnel_quality,
    "engines": engines_cost,
    "gpu": _gpu,
    "host": _host,
    "m3": lambda args: m3_cost(args.runs),
}


def chosen(name: str) -> list[Callable[..., list[dict]]]:
    """What a name measures: one of MEASURES, or `all` that this machine can measure."""
    if name != "all":
        return [MEASURES[name]]
    if not torch.cuda.is_available():
        print("gpu is left out: this machine does not have a CUDA GPU", flush=True)
    return [measure for name, measure in MEASURES.items() if name != "gpu" or torch.cuda.is_available()]


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
