"""What scripts print and write: lines, JSON, tables and heat maps."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling_2dmse import Size


def say(line: str) -> None:
    """Print a line, in the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


def write_json(path: str | Path, content) -> None:
    """Write atomically: a reader sees either the old file or the complete new one."""
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(partial, path)
    finally:  # of a full disk, for example
        with contextlib.suppress(OSError):
            os.remove(partial)


def score_table(columns: dict[str, dict[str, float]], sizes: Sequence["Size"], header: str) -> str:
    """A text table with a row per size: `columns` maps a title to {size: score}."""
    lines = [f"{header:<10}" + "".join(f"{title:>14}" for title in columns)]
    for size in sizes:
        lines.append(f"{size!s:<10}" + "".join(f"{column[str(size)]:>14.4f}" for column in columns.values()))
    return "\n".join(lines)


def save_heatmap(results: dict, sizes: Sequence["Size"], path: str | Path) -> None:
    """A picture of the main metric of every task, with a row per layer and a column per dim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from trainer.evaluation import main_scores, metric_name

    scores = main_scores(results)
    layers, dims = sorted({s.num_layers for s in sizes}), sorted({s.dim for s in sizes})
    width = max(3.5, 0.7 * len(dims) + 1.5)
    figure, axes = plt.subplots(
        1, len(scores), figsize=(width * len(scores), 0.45 * len(layers) + 1.6), squeeze=False, layout="constrained"
    )
    for axis, (task, values) in zip(axes[0], scores.items(), strict=True):
        grid = np.full((len(layers), len(dims)), np.nan)
        for size in sizes:
            grid[layers.index(size.num_layers), dims.index(size.dim)] = values[str(size)]
        axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value < middle else "black"
                axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)
        axis.set(title=f"{task}, {metric_name(task, results)}", xlabel="dimensions", ylabel="layers")
        axis.set_xticks(range(len(dims)), dims)
        axis.set_yticks(range(len(layers)), layers)
    figure.savefig(path, dpi=120)
    plt.close(figure)
