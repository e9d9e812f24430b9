"""The command line of all scripts: recipes, flags, and errors in one line."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging as transformers_logging

from run_scripts.shared import screen, secrets
from run_scripts.shared.help_text import Formatter, clean, sections, transformers_flags

# In a log, the bars of `datasets` and of the loading of a model would be more lines before an error.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported
    transformers_logging.disable_progress_bar()

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# Flags that had another name: an old command or recipe is told the new one.
RENAMED = {
    "plain_file": "unlabeled_file",
    "plain_weight": "unlabeled_weight",
    "max_train_rows": "max_train_samples",
    "eval_rows": "max_eval_samples",
}
# What people call flags that have another name here.
OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "out": "output_dir",
    "size": "num_layers",
}
# Flags that an error offers at most.
_OFFERED = 3


class Parser(HfArgumentParser):
    """HfArgumentParser with a YAML recipe as the first argument and a help that is easy to read.

    Flags override the recipe. With a subclass of transformers' TrainingArguments among the dataclasses, --help shows
    the flags in groups (`help_text.GROUPS`), and --help_all also those that only transformers defines.
    """

    def __init__(self, dataclass_types, default_recipe: str | None = None, **kwargs):
        kwargs.setdefault("usage", "%(prog)s [RECIPE.yaml] [--flag value ...]")
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=Formatter, **kwargs)
        self.default_recipe, self.shows_all = default_recipe, False
        self.transformers_flags = transformers_flags(self.dataclass_types)
        if self.transformers_flags:
            self.epilog = "--help_all also shows the other flags of transformers.TrainingArguments."
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show all flags and exit")
        for action in self._actions:
            if action.nargs is None and (action.type is string_to_bool or action.dest == "resume_from_checkpoint"):
                action.nargs, action.const = "?", True if action.type is string_to_bool else "true"
        clean(self)

    def parse(self, argv: Sequence[str] | None = None, check: Callable[..., None] | None = None) -> tuple:
        """
        The dataclasses, filled from the recipe and the flags; without any argument, from the default recipe.

        Args:
            argv: the arguments; those of the process if None.
            check: called before the last dataclass is made, with the other ones and with the values of all flags.
                Making TrainingArguments takes seconds; a ValueError of `check` comes before.

        Raises:
            ValueError: the recipe cannot be read, or a flag is unknown or has a new name.
        """
        screen.show_any_text()
        argv = list(sys.argv[1:] if argv is None else argv)
        recipe = self.default_recipe if not argv else None
        if argv and not argv[0].startswith("-"):
            recipe = argv.pop(0)
        flags = [*(recipe_flags(recipe) if recipe else []), *argv]
        secrets.remember(flags)
        refuse_renamed(flags, self._option_string_actions)
        refuse_unknown(flags, self._option_string_actions)
        values, unknown = self.parse_known_args(flags)
        if unknown:
            raise ValueError(f"flags: {' '.join(unknown)} belongs to no flag; --help lists the flags")
        self._refuse_senseless(values)
        screen.hide_noise()
        parsed: list = []
        for number, kind in enumerate(self.dataclass_types, 1):
            if check is not None and number == len(self.dataclass_types):
                check(*parsed, values)
            names = [field.name for field in dataclasses.fields(kind) if field.init]
            try:
                parsed.append(kind(**{name: getattr(values, name) for name in names}))
            except ImportError as error:  # of a library that only a flag needs, such as DeepSpeed
                raise ValueError(f"flags: {error}") from error
        return tuple(parsed)

    def _refuse_senseless(self, values: argparse.Namespace) -> None:
        """What no flag can mean: an empty value (of a variable that a shell did not set, for example), a NUL, and a
        number that no computer counts to."""
        for action in self._actions:
            given = getattr(values, action.dest, None)
            for value in given if isinstance(given, list) else [given]:
                empty = value == "" != action.default  # transformers' own default of some flags is empty
                if empty and not action.dest.endswith("_prompt"):
                    raise ValueError(f"{action.dest}: its value is empty; name one, or leave the flag out")
                if isinstance(value, str) and "\0" in value:
                    raise ValueError(f"{action.dest}: {value!r} has a NUL character, which is not allowed")
                if isinstance(value, int) and abs(value) > sys.maxsize:
                    raise ValueError(f"{action.dest}: {value} is not allowed; use a number below {sys.maxsize}")

    def error(self, message):
        fail(message)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, actions in sections(self).items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if not self.shows_all:
            formatter.add_text(self.epilog)
        return formatter.format_help()


class _HelpAll(argparse.Action):
    """The help with the flags of transformers."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def refuse_renamed(flags: Sequence[str], options: Collection[str]) -> None:
    """ValueError for a flag that has a new name among the options of a script."""
    for flag in flags:
        old = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        new = RENAMED.get(old) if flag.startswith("--") else None
        if new is not None and f"--{new}" in options:
            raise ValueError(f"flags: --{old} is now --{new}")


def refuse_unknown(flags: Sequence[str], options: Collection[str]) -> None:
    """ValueError for a flag that is no option; argparse would first ask for a required flag, perhaps the one that is
    misspelled."""
    for flag in flags:
        name = flag.partition("=")[0]
        if not re.fullmatch(r"--?[A-Za-z]\S*", name) or name in options:
            continue
        wanted = f"--{name.lstrip('-').replace('-', '_')}"
        negated = wanted.startswith("--no_")  # every flag has a negated form in `early`, and few really have
        known = [
            option for option in options if "-" not in option.lstrip("-") and option.startswith("--no_") <= negated
        ]
        near = find_near(wanted, known)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the flags"
        raise ValueError(f"flags: {name} is unknown; {hint}")


def find_near(wanted: str, known: Collection[str]) -> list[str]:
    """The flags that an unknown one may stand for: by its other name, first letters, spelling, or words.

    >>> find_near("--model", ["--model_name_or_path", "--mode"])
    ['--model_name_or_path']
    >>> find_near("--train_batch", ["--per_device_train_batch_size", "--train_file"])
    ['--per_device_train_batch_size']
    """
    other = f"--{OTHER_NAMES.get(wanted.removeprefix('--'), '')}"
    for exact in (wanted, other):
        if exact in known:
            return [exact]
    near = [option for option in known if option.startswith(wanted)]
    if not near:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.75)
    if not near:
        words = set(wanted.removeprefix("--").split("_"))
        near = [option for option in known if words <= set(option.removeprefix("--").split("_"))]
    return sorted(near, key=len) if len(near) <= _OFFERED else []


def exactly_one(args, first: str, second: str, what: str) -> None:
    """ValueError unless exactly one of two flags, which both name `what`, is given."""
    if (getattr(args, first) is None) == (getattr(args, second) is None):
        raise ValueError(f"{first}: name {what} with either --{first} or --{second}")


def fail(message) -> None:
    """End the program with one line on stderr and exit code 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        line = secrets.hide(" ".join(str(message).split()))
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors():
    """For the checks before the work starts: wrong input ends the program with one line instead of a traceback."""
    try:
        yield
    except BrokenPipeError:  # see `interrupts`
        raise
    except (ValueError, OSError) as error:
        fail(error)


@contextlib.contextmanager
def writing(folder: str):
    """Around what is written after the work: a full disk, for example, ends the program with one line."""
    try:
        yield
    except OSError as error:
        fail(f"output_dir: {folder} could not be written: {error}")


@contextlib.contextmanager
def reading_pictures():
    """Around work that decodes pictures: a damaged one ends the program with one line."""
    from trainer.shared.pictures import PictureError

    try:
        yield
    except PictureError as error:
        fail(error.line)


def recipe_flags(path: str) -> list[str]:
    """The flags that a YAML recipe sets."""
    if not os.path.isfile(path):
        name = os.path.splitext(os.path.basename(path))[0]
        near = difflib.get_close_matches(name, [recipe.stem for recipe in RECIPES.glob("*.yaml")], n=1)
        folder = RECIPES.relative_to(Path.cwd()) if RECIPES.is_relative_to(Path.cwd()) else RECIPES
        hint = f"; did you mean {folder / near[0]}.yaml?" if near else ""
        if not near and not path.endswith((".yaml", ".yml")):
            hint = "; the first word is a recipe (YAML), and everything else is --flag value"
        raise ValueError(f"recipe: {path} is not a file{hint}")
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of text that is not UTF-8, and of wrong dates
        raise ValueError(f"recipe: {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe: {path} must contain `name: value` lines")
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
