"""Refuse the unknown flags of a training script before torch is imported, which takes seconds.

A training script imports this module for that effect. A parser needs the class of transformers' TrainingArguments, and
so torch. Here, the flags are the annotated fields in the source files of the script's dataclasses.
"""

import ast
import importlib.util
import sys
from pathlib import Path

from run_scripts.shared import cli

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


def refuse_unknown_flags(program: str, flags: list[str]) -> None:
    """End the program with one line if a flag is unknown, in a process that is a training script."""
    by_name = program.removeprefix("twodmse ")
    path = Path(program).resolve()  # another program of that name may import a script and have flags of its own
    script = path.stem if path.parent == ROOT / "run_scripts" else by_name if by_name != program else ""
    if script in TRAININGS:
        with cli.user_errors():
            cli.refuse_renamed(flags, options := find_options(script))
            cli.refuse_unknown(flags, options)


refuse_unknown_flags(sys.argv[0], sys.argv[1:])
