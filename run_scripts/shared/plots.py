"""Pictures: one colour per method in all of them, ours on top, and the heat map of every layer by every dim."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run_scripts.shared.output import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from modeling_2dmse import Size

OURS = "best"
# Of compare.py's methods; colours that readers with red-green blindness tell apart (Okabe and Ito), and greys.
COLORS = {
    "untrained": "#999999",
    "projections": "#f0e442",
    "projections-refined": "#ddaa33",
    "projections-gates": "#117733",
    "pca": "#555555",
    "separate": "#000000",
    "separate-same-recipe": "#882255",
    "matryoshka": "#e69f00",
    "2dmse": "#cc79a7",
    "starbucks-feature_kl": "#56b4e9",
    "starbucks-score_kl": "#0072b2",
    "smae-starbucks": "#009e73",
    "sentence-transformers-2d": "#8c6d31",
    "sentence-transformers-2d-all": "#44aa99",
    OURS: "#d55e00",
}
# Of classify.py's and plan.py's choices, and of benchmark.py's kinds of work.
COLORS |= {"one size": COLORS["starbucks-score_kl"], "cascade": COLORS[OURS], "oracle": COLORS["separate"]}
COLORS |= {"front": COLORS[OURS], "other": COLORS["untrained"], "encode": "#0072b2", "train": "#d55e00"}


def line_style(method: str) -> dict:
    """How the line of a method is drawn: always in its colour, ours thicker and on top."""
    style = {"color": COLORS[method], "marker": "o", "markersize": 4, "linewidth": 1.3, "zorder": 2}
    if method == "untrained":
        style["linestyle"] = "--"
    return style | ({"linewidth": 3, "markersize": 7, "zorder": 4} if method == OURS else {})


def public_name(model: str) -> str:
    """The Hub name of a model, or the last part of its path."""
    return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model


def set_title(axis: "Axes", *lines: str) -> None:
    """A title that stays within the width of its axis."""
    width = axis.get_figure().get_figwidth() / axis.get_gridspec().ncols
    wrapped = [part for line in lines for part in textwrap.wrap(line, max(12, int(9.5 * width)))]
    axis.set_title("\n".join(wrapped), fontsize=10)


def save_heatmap(results: dict, sizes: Sequence["Size"], ladder: Sequence["Size"], path: str | Path) -> None:
    """A picture of the main metric of every task, a row per layer and a column per dim; trained sizes have a frame.

    Args:
        results: of evaluate.py or finetune.py; `model` is the title.
        sizes: the sizes that were evaluated.
        ladder: the sizes that the model was trained for.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    from trainer.evaluation import main_scores, metric_name

    scores = main_scores(results)
    layers, dims = sorted({s.num_layers for s in sizes}), sorted({s.dim for s in sizes})
    width, height = max(4.5, 0.75 * len(dims) + 1.8), max(2.6, 0.42 * len(layers) + 1.7)
    figure = Figure(figsize=(width * len(scores), height), layout="constrained")
    axes = figure.subplots(1, len(scores), squeeze=False)[0]
    for axis, (task, values) in zip(axes, scores.items(), strict=True):
        _draw_grid(axis, values, sizes, layers, dims)
        for size in set(ladder) & set(sizes):
            _frame(axis, layers.index(size.num_layers), dims.index(size.dim))
        set_title(axis, public_name(results["model"]), f"{task}, {metric_name(task, results)}")
        axis.set(xlabel="dimensions (framed: trained sizes)" if axis.patches else "dimensions", ylabel="layers")
        axis.set_xticks(range(len(dims)), dims)
        axis.set_yticks(range(len(layers)), layers)
    save_picture(figure, path)


def save_picture(figure: "Figure", path: str | Path) -> None:
    """Write a picture atomically, as PNG."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw_grid(axis: "Axes", values: dict[str, float], sizes, layers: list[int], dims: list[int]) -> None:
    """The cells, each with its value in a colour that can be read on it, and a colour bar."""
    import numpy as np

    grid = np.full((len(layers), len(dims)), np.nan)
    for size in sizes:
        grid[layers.index(size.num_layers), dims.index(size.dim)] = values[str(size)]
    image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
    axis.get_figure().colorbar(image, ax=axis, pad=0.02)
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)


def _frame(axis: "Axes", row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=COLORS[OURS], linewidth=2))
