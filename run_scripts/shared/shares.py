"""The picture of a search that sizes keep: share of the untouched full size's nDCG@10 over the time to encode.

`elasticize.py` draws it for its run. For several runs in one picture, a panel for each corpus:

    python -m run_scripts.shared.shares picture.png out/cacm-fit/results.json out/cacm-short/results.json ...
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Untouched, and after each effort of elasticize.py, in the colours that the methods have in other pictures: fit refines
# projections, short and full are ours on fewer and more pairs.
_STYLES = {
    "untouched": {"color": plots.COLORS["untrained"], "linestyle": "--"},
    "fit": {"color": plots.COLORS["projections-refined"]},
    "short": {"color": plots.COLORS[plots.OURS], "linewidth": 3, "markersize": 7, "zorder": 4},
    "full": {"color": plots.COLORS[plots.OURS], "linestyle": "-.", "marker": "s", "zorder": 5},
}
# Relative times whose labels would touch.
_NEAR = 0.1


def shares(results: dict, name: str) -> dict[str, dict[str, float]]:
    """Of one set of queries, untouched and after: the share of the untouched full size's nDCG@10 of each size.

    Args:
        results: `results.json` of elasticize.py.
        name: of the set, as in its `retrieval`.

    Returns:
        `{"untouched": {"1x32": ..., ...}, effort: {...}}`; nothing where the untouched full size finds nothing.
    """
    before, after = (found["retrieval"][name]["ndcg@10"] for found in (results["before"], results))
    full = before[list(results["costs"])[-1]]
    if full <= 0:
        return {}
    return {
        label: {size: scores[size] / full for size in results["costs"]}
        for label, scores in (("untouched", before), (results["effort"], after))
    }


def save_shares(runs: Sequence[dict], path: str | Path) -> bool:
    """Draw the shares that runs keep.

    Args:
        runs: `results.json` of one run, of which every set of queries is drawn, or of several, of which only the set
            that is named as the run's corpus is drawn.
        path: of the picture.

    Returns:
        whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[dict]] = {}
    for run in runs:
        names = list(run.get("retrieval", {}))
        for name in names if len(runs) == 1 else [name for name in names if name == run["corpus"]]:
            if shares(run, name):
                panels.setdefault(name, []).append(run)
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        _draw(axis, name, members)
    axes[0].set_ylim(0, max(1.2, 1.1 * max(axis.dataLim.ymax for axis in axes)))
    axes[0].set_ylabel("nDCG@10, share of the untouched full size")
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    labels = [label for label in _STYLES if label in lines]
    figure.legend([lines[label] for label in labels], labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    plots.save_picture(figure, path)
    return True


def _draw(axis: "Axes", name: str, runs: Sequence[dict]) -> None:
    from matplotlib.patheffects import withStroke

    drawn: dict[str, tuple[list[float], list[float]]] = {}
    for run in runs:
        times = [run["costs"][size]["relative_time"] for size in run["costs"]]
        for label, values in shares(run, name).items():
            drawn.setdefault(label, (times, list(values.values())))
    for label in _STYLES:
        if label in drawn:
            axis.plot(*drawn[label], label=label, **{"marker": "o", "markersize": 4} | _STYLES[label])
    times, values = drawn[[label for label in _STYLES if label in drawn][-1]]
    for place, (size, x, y) in enumerate(zip(runs[-1]["costs"], times, values, strict=True)):
        last = place == len(times) - 1  # the lines of all runs come to it from below
        height = -16 if place % 2 and not last else 8  # neighbours may take nearly the same time
        near = [abs(other - x) < _NEAR for other in (*times[place - 1 : place], *times[place + 1 : place + 2])]
        side = "center" if not any(near) else "right" if height > 0 else "left"  # away from a line that rises
        label = axis.annotate(size, (x, y), xytext=(0, height), textcoords="offset points", ha=side, fontsize=7)
        label.set(path_effects=[withStroke(linewidth=2, foreground="white")], zorder=6)  # readable on lines
    plots.set_title(axis, *dict.fromkeys((runs[-1].get("base_model") or plots.public_name(runs[-1]["model"]), name)))
    axis.set(xlabel="time to encode, relative to the full size", xlim=(0, 1.1), xticks=[n / 5 for n in range(6)])
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    save_shares([json.loads(Path(path).read_text("utf-8")) for path in sys.argv[2:]], sys.argv[1])
