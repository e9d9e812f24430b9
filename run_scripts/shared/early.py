"""Refuse the unknown flags of a training script, and some wrong values, before torch is imported, which takes seconds.

A training script imports this module for that effect. A parser needs the class of transformers' TrainingArguments, and
so torch. Here, the flags are the annotated fields in the source files of the script's dataclasses.
"""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from run_scripts.shared import checks, cli
from trainer.shared.headings import check_heading, read_names
from trainer.shared.roles import parse_role

ROOT = Path(__file__).resolve().parents[2]

# The training scripts, and the folder of `trainer` that has their arguments.
TRAININGS = {
    "classify": "mrl",
    "elasticize": ".",
    "finetune": ".",
    "pretrain": "smae",
    "pretrain_franca": "franca",
    "train_m3": "m3",
}


def find_options(script: str) -> list[str]:
    """All flags of a training script, and a few names that are no flags."""
    transformers = importlib.util.find_spec("transformers")
    assert transformers is not None
    assert transformers.origin is not None
    files = (
        ROOT / "run_scripts" / f"{script}.py",
        ROOT / "run_scripts" / "shared" / "runs.py",
        ROOT / "trainer" / "shared" / "arguments.py",
        ROOT / "trainer" / TRAININGS[script] / "arguments.py",
        Path(transformers.origin).with_name("training_args.py"),
    )
    kinds = [node for file in files for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef)]
    fields = [node.target for kind in kinds for node in kind.body if isinstance(node, ast.AnnAssign)]
    names = [prefix + field.id for field in fields if isinstance(field, ast.Name) for prefix in ("", "no_")]
    return [
        "-h",
        "--help",
        "--help_all",
        *(f"--{spelled}" for name in names for spelled in (name, name.replace("_", "-"))),
    ]


def read_values(flags: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag, by its name with underscores; of a flag that is given twice, the last ones."""
    values: dict[str, list[str]] = {}
    found: list[str] = []
    for word in flags:
        if re.match(r"--[A-Za-z]", word):
            name, mark, value = word.removeprefix("--").partition("=")
            found = values[name.replace("-", "_")] = [value] if mark else []
        else:
            found.append(word)
    return values


def refuse_values(script: str, values: Mapping[str, Sequence[str]]) -> None:
    """ValueError for what some flags have wrong, in the order in which a run would find it."""
    for name in ("train_file", "eval_file", "unlabeled_file", "corpus_file"):
        for path in values.get(name, ()):
            if os.path.isfile(path):
                check_heading(path, name)
    tables = [read_names(path) for path in values.get("train_file", ())]
    for name in [parse_role(entry)[0] for entry in values.get("columns", ())]:
        if tables and all(names is not None and name not in names for names in tables):
            raise ValueError(f"columns: train_file has no column {name}, only {', '.join(tables[0] or ())}")
    models = {name: paths[-1] for name, paths in values.items() if name.endswith("model_name_or_path") and paths}
    if TRAININGS[script] in (".", "smae"):  # sizes of a classifier may be dimensions
        checks.check_sizes(values.get("sizes", ()), model=models.get("model_name_or_path"))
    for name, path in models.items():
        checks.check_model(path, name)


def refuse(program: str, words: Sequence[str]) -> None:
    """End the program with one line if a flag is unknown or has a wrong value, in a process that is a training
    script."""
    by_name = program.removeprefix("twodmse ")
    path = Path(program).resolve()  # another program of that name may import a script and have flags of its own
    script = path.stem if path.parent == ROOT / "run_scripts" else by_name if by_name != program else ""
    if script not in TRAININGS:
        return
    with cli.user_errors():
        cli.refuse_renamed(words, options := find_options(script))
        cli.refuse_unknown(words, options)
        if {"-h", "--help", "--help_all"}.intersection(words):
            return
        words = words[1:] if script == "classify" else words  # its first word is a command
        has_recipe = bool(words) and not words[0].startswith("-")
        refuse_values(script, read_values([*cli.recipe_flags(words[0]), *words[1:]] if has_recipe else words))


refuse(sys.argv[0], sys.argv[1:])
