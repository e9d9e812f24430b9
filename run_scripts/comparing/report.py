"""The comparison as a table and a picture."""

import statistics
from collections.abc import Sequence

from modeling_2dmse import Size
from run_scripts.shared import plots

from .methods import METHODS


def means(
    rows: list[dict], train: str, tasks: Sequence[str], kind: str = "scores"
) -> dict[str, dict[str, dict[int, float]]]:
    """
    Mean over tasks of the scores, as {method: {size: {seed: score}}}, methods in the order of METHODS.

    Args:
        rows: `rows` of the results file; a row of a separate model has one size.
        train: name of the training data whose rows are taken.
        tasks: names of the tasks that are averaged.
        kind: `scores` for sentence pairs, `retrieval` for search.
    """
    found: dict[str, dict[str, dict[int, float]]] = {method: {} for method in METHODS}
    for row in rows:
        if row["train"] != train or kind not in row:
            continue
        for size in row[kind][tasks[0]]:
            value = statistics.fmean(row[kind][task][size] for task in tasks)
            found[row["method"]].setdefault(size, {})[row["seed"]] = value
    return {method: sizes for method, sizes in found.items() if sizes}


def table(scores: dict[str, dict[str, dict[int, float]]], ladder: Sequence[Size]) -> str:
    """Markdown: a line per size and one for the ladder's mean, each the mean and deviation over seeds, times 100."""
    names = [str(size) for size in ladder]
    lines = ["| size | " + " | ".join(scores) + " |", "|---|" + "---:|" * len(scores)]
    for name in names:
        cells = [_cell(list(sizes.get(name, {}).values())) for sizes in scores.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = [_cell(list(ladder_means(sizes, names).values())) for sizes in scores.values()]
    return "\n".join([*lines, "| ladder mean | " + " | ".join(cells) + " |"])


def ladder_means(sizes: dict[str, dict[int, float]], names: Sequence[str]) -> dict[int, float]:
    """{seed: mean over the ladder}, for the seeds that have a score at every size."""
    seeds = set.intersection(*(set(sizes.get(name, {})) for name in names))
    return {seed: statistics.fmean(sizes[name][seed] for name in names) for seed in sorted(seeds)}


def tried(search: list[dict], rows: list[dict], train: str) -> list[dict]:
    """
    What was tried for whom: the learning rates of each method, or of each of its separate models, and the chosen one.

    Args:
        search: `search` of the results file.
        rows: `rows` of the results file.
        train: name of the training data.

    Returns:
        per method and size: `settings`, the number of rates that were tried, `rates` with their mean score on the held
        out data, and `chosen`; a method without training has no rates.
    """
    entries: dict[tuple, dict] = {}
    for row in [row for row in rows if row["train"] == train]:
        key = {name: row[name] for name in ("method", "size") if name in row}
        mine = [run for run in search if run["train"] == train and all(run.get(k) == v for k, v in key.items())]
        scores = {run["learning_rate"]: _only_mean(run["scores"]) for run in mine}
        rates = {f"{rate:g}": scores[rate] for rate in sorted(scores)}
        chosen = row["learning_rate"]
        entries[tuple(key.values())] = key | {"settings": len(rates), "rates": rates, "chosen": chosen}
    return sorted(entries.values(), key=lambda entry: METHODS.index(entry["method"]))


def tried_table(entries: list[dict]) -> str:
    """Markdown: a line per method, or per separate model."""
    lines = ["| method | settings tried | learning rates, with the score they are chosen by | chosen |"]
    lines.append("|---|---:|---|---:|")
    for entry in entries:
        rates = ", ".join(f"{rate}: {100 * score:.2f}" for rate, score in entry["rates"].items())
        name = " ".join(entry[part] for part in ("method", "size") if part in entry)
        chosen = "" if entry["chosen"] is None else f"{entry['chosen']:g}"
        lines.append(f"| {name} | {entry['settings']} | {rates} | {chosen} |")
    return "\n".join(lines)


def _only_mean(scores: dict[str, dict[str, float]]) -> float:
    (sizes,) = scores.values()  # rates are chosen by one task
    return statistics.fmean(sizes.values())


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    text = f"{100 * statistics.fmean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.2f}"


def draw(
    scores: dict[str, dict[str, dict[int, float]]], ladder: Sequence[Size], path: str, title: str, tasks: Sequence[str]
) -> None:
    """Plot score over cost (share of layers that run), a line per method; bars are one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    deepest = max(size.num_layers for size in ladder)
    for method, sizes in scores.items():
        points = [(size, list(sizes[str(size)].values())) for size in ladder if str(size) in sizes]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        cost = [size.num_layers / deepest for size, _ in points]
        label = f"{method} (ours)" if method == plots.OURS else method
        axis.errorbar(
            cost, [statistics.fmean(v) for _, v in points], spread, label=label, capsize=2, **plots.line_style(method)
        )
    mean = "mean over " if len(tasks) > 1 else ""
    axis.set_xticks([size.num_layers / deepest for size in ladder], [str(size) for size in ladder])
    axis.set(xlabel="size; the distance is the cost, layers that run", ylabel=f"Spearman, {mean}{', '.join(tasks)}")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    plots.set_title(axis, title)
    plots.save_picture(figure, path)
