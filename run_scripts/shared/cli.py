"""The command line of all scripts: recipes, flags, and errors in one line."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


class Parser(HfArgumentParser):
    """HfArgumentParser with a YAML recipe as the first argument; flags override the recipe."""

    def __init__(self, dataclass_types, default_recipe: str | None = None, **kwargs):
        kwargs.setdefault("usage", "%(prog)s [RECIPE.yaml] [--flag value ...]")
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.default_recipe = default_recipe

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """The dataclasses, filled from recipe and flags; without any argument, from the default recipe."""
        argv = list(sys.argv[1:] if argv is None else argv)
        recipe = self.default_recipe if not argv else None
        if argv and not argv[0].startswith("-"):
            recipe = argv.pop(0)
        flags = [*(recipe_flags(recipe) if recipe else []), *argv]
        *parsed, unknown = self.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"flags: {' '.join(unknown)} is unknown; --help lists what there is")
        return tuple(parsed)

    def error(self, message):
        fail(message)


def fail(message) -> None:
    """End the program with one line on stderr and exit code 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        line = " ".join(str(message).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors():
    """Around the work before training starts: wrong input ends in one line, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def recipe_flags(path: str) -> list[str]:
    """The flags that a YAML recipe stands for."""
    if not os.path.isfile(path):
        raise ValueError(f"recipe: {path} is not a file")
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe: {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe: {path} must hold `name: value` lines")
    flags = []
    for name, value in recipe.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        else:
            values = value if isinstance(value, list) else [value]
            flags += [str(item).lower() if isinstance(item, bool) else str(item) for item in values]
    return flags
