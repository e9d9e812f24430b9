"""What scripts print and write: lines, JSON and tables."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling_2dmse import Size


def say(line: str) -> None:
    """Print a line, in the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Write atomically: the name under which the block writes a file, which then gets its own name. A reader sees
    either the old file or the complete new one."""
    partial = f"{path}.partial"
    try:
        yield partial
        os.replace(partial, path)
    finally:  # of a full disk, for example
        with contextlib.suppress(OSError):
            os.remove(partial)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder that does not exist, whole or not at all: the folder into which the block writes, which then gets
    its own name. What killed processes have left of it is removed first."""
    from retrieval.replacing import clean_up, partial_path

    path = Path(os.path.abspath(path))
    clean_up(path)
    partial = partial_path(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | Path, content) -> None:
    """Write atomically, see `replacing`."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def score_table(columns: dict[str, dict[str, float]], sizes: Sequence["Size"], header: str) -> str:
    """A text table with a row per size: `columns` maps a title to {size: score}."""
    lines = [f"{header:<10}" + "".join(f"{title:>14}" for title in columns)]
    for size in sizes:
        lines.append(f"{size!s:<10}" + "".join(f"{_cell(column[str(size)]):>14}" for column in columns.values()))
    return "\n".join(lines)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def grid_table(scores: dict[str, float], sizes: Sequence["Size"]) -> str:
    """A text table of one task, with a row per number of layers and a column per dim.

    >>> from modeling_2dmse import Size
    >>> print(grid_table({"1x8": 0.5, "2x8": 0.75}, [Size(1, 8), Size(2, 8)]))
    layers           8
    1           0.5000
    2           0.7500
    """
    dims = sorted({size.dim for size in sizes})
    lines = ["layers    " + "".join(f"{dim:>8}" for dim in dims)]
    for n in sorted({size.num_layers for size in sizes}):
        lines.append(f"{n:<10}" + "".join(f"{scores[f'{n}x{dim}']:>8.4f}" for dim in dims))
    return "\n".join(lines)
