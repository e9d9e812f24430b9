"""Refuse the unknown flags of a training script, and some wrong values, before torch is imported, which takes seconds.

A training script imports this module for that effect. A parser needs the class of transformers' TrainingArguments, and
so torch. Here, the flags are the annotated fields in the source files of the script's dataclasses.
"""

import ast
import importlib.util
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from run_scripts.shared import checks, cli
from trainer.choices import CHOICES, find_unknown
from trainer.shared.headings import check_heading, read_names
from trainer.shared.roles import check_names, parse_role

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

_VALUES: dict[str, tuple[Callable[[str], object], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (string_to_bool, "true or false"),
}


def find_kinds(script: str) -> dict[str, str]:
    """The annotation of each flag of a training script, and of a few names that are no flags."""
    transformers = importlib.util.find_spec("transformers")
    assert transformers is not None
    assert transformers.origin is not None
    files = (
        Path(transformers.origin).with_name("training_args.py"),
        ROOT / "trainer" / "shared" / "arguments.py",
        ROOT / "trainer" / TRAININGS[script] / "arguments.py",
        ROOT / "run_scripts" / "shared" / "runs.py",
        ROOT / "run_scripts" / f"{script}.py",
    )
    kinds = [node for file in files for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef)]
    fields = [node for kind in kinds for node in kind.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.unparse(node.annotation) for node in fields if isinstance(node.target, ast.Name)}


def find_options(names: Collection[str]) -> list[str]:
    """All flags of a training script whose fields have these names, and a few names that are no flags."""
    return [
        "-h",
        "--help",
        "--help_all",
        *(
            f"--{spelled}"
            for name in names
            for prefixed in (name, f"no_{name}")
            for spelled in (prefixed, prefixed.replace("_", "-"))
        ),
    ]


def refuse_kinds(kinds: Mapping[str, str], values: Mapping[str, Sequence[str]]) -> None:
    """ValueError for a flag without a value, and for a number or a truth value that is none."""
    for name, given in values.items():
        first, *others = kinds.get(name, "bool").split(" | ")
        if not given and "bool" not in (first, *others) and name != "resume_from_checkpoint":
            raise ValueError(f"{name}: a value is missing after --{name}")
        number, what = _VALUES.get(first, (str, ""))
        if others not in ([], ["None"]):
            continue
        for value in given:
            try:
                number(value)
            except (ValueError, ArgumentTypeError):
                raise ValueError(f"{name}: {value!r} is not {what}") from None


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
            if name == "train_file" and script == "finetune":
                checks.check_tables(name, path)
            elif os.path.isfile(path):
                check_heading(path, name)
    tables = [read_names(path) for path in values.get("train_file", ())]
    columns = values.get("columns", ())
    for name in [parse_role(entry)[0] for entry in columns]:
        if tables and all(names is not None and name not in names for names in tables):
            raise ValueError(f"columns: train_file has no column {name}, only {', '.join(tables[0] or ())}")
    if script == "finetune":
        for names in filter(None, tables):
            check_names(names, columns, "train_file")
    if TRAININGS[script] == ".":
        unknown = find_unknown({name: values[name][-1] for name in CHOICES if values.get(name)})
        if unknown:
            raise ValueError("; ".join(unknown))
        for word in values.get("effort", ()):
            checks.check_choice("effort", word, checks.EFFORTS)
    for path in values.get("output_dir", ()):
        checks.check_no_file(path)
    models = {name: paths[-1] for name, paths in values.items() if name.endswith("model_name_or_path") and paths}
    if TRAININGS[script] in (".", "smae"):  # sizes of a classifier may be dimensions
        checks.check_sizes(values.get("sizes", ()), model=models.get("model_name_or_path"))
        for word in values.get("pooling", ()):
            checks.check_choice("pooling", word, checks.POOLINGS)
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
        kinds = find_kinds(script)
        cli.refuse_renamed(words, options := find_options(kinds))
        cli.refuse_unknown(words, options)
        if {"-h", "--help", "--help_all"}.intersection(words):
            return
        words = words[1:] if script == "classify" else words  # its first word is a command
        has_recipe = bool(words) and not words[0].startswith("-")
        values = read_values([*cli.recipe_flags(words[0]), *words[1:]] if has_recipe else words)
        refuse_kinds(kinds, values)
        refuse_values(script, values)


refuse(sys.argv[0], sys.argv[1:])
