"""Checks of flags that need no torch, so that a script refuses wrong input before it loads the libraries it works with.

What the libraries check again is stated here a second time; tests/run_scripts/test_fast_refusals.py compares the two.
"""

import os
import re
from collections.abc import Sequence

from run_scripts.shared.model_folder import PACKAGED, check_on_hub, read_shape
from trainer.shared.headings import check_format, check_heading

# modeling_2dmse.formats.PRECISIONS, modeling_2dmse.export.DTYPES, modeling_franca.rasa.METHODS and
# modeling_2dmse.configuration_2dmse.POOLING_MODES.
PRECISIONS = ("float32", "float16", "int8", "binary")
EXPORT_DTYPES = {"transformers": ("float32", "float16", "bfloat16"), "onnx": ("float32", "int8")}
RASA_METHODS = ("gradient", "ridge", "covariance")
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean")
# Of elasticize.py.
EFFORTS = ("fit", "short", "full")


def check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    """ValueError if the value is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}: {value!r} is unknown; choose one of {', '.join(allowed)}")


def check_at_least(argument: str, value: int | None, lowest: int) -> None:
    """ValueError if the number is below the lowest allowed one; None is a flag that was not given."""
    if value is not None and value < lowest:
        raise ValueError(f"{argument}: {value} is not allowed; use a whole number from {lowest}")


def parse_part(text: str, argument: str = "part") -> tuple[int, int]:
    """The number of a part, from 0, and the number of parts, of a text like `3/64`; ValueError for anything else.

    >>> parse_part("3/64")
    (2, 64)
    """
    match = re.fullmatch(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(
            f"{argument}: {text!r} is not allowed; write NUMBER/PARTS with NUMBER from 1 to PARTS, as in 3/64"
        )
    return int(match[1]) - 1, int(match[2])


def check_seeds(seeds: Sequence[int], argument: str = "seeds") -> None:
    """ValueError if there is no seed, or if one is not what the random generators of numpy and torch take."""
    if not seeds:
        raise ValueError(f"{argument}: name at least one")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{argument}: {seed} is not allowed; use whole numbers from 0 to {2**32 - 1}")


def check_sizes(sizes: Sequence[str], argument: str = "sizes", model: str | None = None) -> None:
    """ValueError if one of the sizes is not written LAYERSxDIM, or if the folder `model` says that it has less.

    What no config.json tells is checked with the model.
    """
    highest = (None, None) if model is None else read_shape(model)
    for size in sizes:
        match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", size.strip())
        if match is None:
            raise ValueError(
                f"{argument}: {size!r} is not a size; write LAYERSxDIM with whole numbers from 1, for example 6x128"
            )
        for number, most, unit in zip(match.groups(), highest, ("layers", "dimensions"), strict=True):
            if most is not None and int(number) > most:
                raise ValueError(f"{argument}: {match[0]} asks for {number} {unit}, but the backbone has 1 to {most}")


def check_chosen_sizes(sizes: Sequence[str], model: str | None = None) -> None:
    """ValueError unless the sizes are `ladder`, `grid` or a list of LAYERSxDIM, see `check_sizes`."""
    if list(sizes) not in (["ladder"], ["grid"]):
        check_sizes(sizes, model=model)


def check_files(argument: str, *paths: str | None) -> None:
    """ValueError if one of the paths is not a file, or a csv or tsv file whose heading has another separator; None is a
    flag that was not given."""
    for path in paths:
        if path is None:
            continue
        if not os.path.isfile(path):
            raise ValueError(f"{argument}: {path} is not a file")
        check_heading(path, argument)


def check_tables(argument: str, *paths: str | None) -> None:
    """ValueError if one of the paths is neither the file of a table nor a folder of `datasets.save_to_disk`."""
    saved = ("dataset_dict.json", "state.json")
    for path in paths:
        if path is not None and os.path.isdir(path):
            if not any(os.path.isfile(os.path.join(path, name)) for name in saved):
                raise ValueError(f"{argument}: {path} is a folder, but not one of datasets.save_to_disk")
        else:
            check_files(argument, path)
            if path is not None:
                check_format(path, argument)


def check_beir_dirs(argument: str, folders: Sequence[str], split: str) -> None:
    """ValueError if one of the folders lacks corpus.jsonl, queries.jsonl or qrels/SPLIT.tsv."""
    for folder in folders:
        for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"):
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                raise ValueError(f"{argument}: {folder} is not in BEIR layout: {path} is missing")


def check_model(name_or_path: str, argument: str = "model_name_or_path") -> None:
    """ValueError unless it is the folder of a model, or the name of one that is packaged, cached or on the Hub."""
    looks_like_a_path = name_or_path.startswith((".", os.sep)) or name_or_path.count("/") > 1
    if looks_like_a_path and not os.path.isdir(name_or_path):
        raise ValueError(f"{argument}: {name_or_path} does not exist")
    if not os.path.isdir(name_or_path):
        if name_or_path != PACKAGED:
            check_on_hub(name_or_path, argument)
        return
    marks = ("config.json", "modules.json")  # the second is all that old folders of sentence-transformers have here
    if not any(os.path.isfile(os.path.join(name_or_path, name)) for name in marks):
        raise ValueError(f"{argument}: {name_or_path} has no config.json, so it is not a model")
    if os.path.isfile(os.path.join(name_or_path, "export.json")):
        raise ValueError(f"{argument}: {name_or_path} is an ONNX export; use the model that it was cut out of")


def check_no_file(output_dir: str) -> None:
    """ValueError if the output folder is a file, or cannot be made or written to."""
    if os.path.isfile(output_dir):
        raise ValueError(f"output_dir: {output_dir} is a file; name a folder")
    found = os.path.abspath(output_dir)
    while not os.path.lexists(found):
        found = os.path.dirname(found)
    if not os.path.isdir(found):
        raise ValueError(f"output_dir: {output_dir} cannot be made, because {found} is not a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: {output_dir} cannot be written, because nothing may be written in {found}")


def check_no_results(output_dir: str, overwrite: bool) -> None:
    """ValueError if the folder is a file, or has the results of an earlier evaluation."""
    check_no_file(output_dir)
    if os.path.exists(os.path.join(output_dir, "results.json")) and not overwrite:
        raise ValueError(f"output_dir: {output_dir} has results; choose another folder or pass --overwrite")
