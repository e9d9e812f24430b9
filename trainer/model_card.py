"""The model card of a training run, made from the results and settings of the run."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.backbone import layers_of

from .evaluation import main_scores, metric_name
from .objectives import Objective

CITATIONS = {
    "2dmse": "Li et al. 2024. 2D Matryoshka Sentence Embeddings. arXiv:2402.14776",
    "starbucks": "Zhuang et al. 2024. Starbucks: Improved Training for 2D Matryoshka Embeddings. arXiv:2410.13230",
    "matryoshka": "Kusupati et al. 2022. Matryoshka Representation Learning. arXiv:2205.13147",
    "espresso": "Li et al. 2024. ESE: Espresso Sentence Embeddings. arXiv:2402.14776 (its later title)",
    "separate": "Zhuang et al. 2024. Starbucks: Improved Training for 2D Matryoshka Embeddings. arXiv:2410.13230",
}
_TEMPLATE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "model_cards", "template.md")


@dataclass
class Run:
    """The contents of a card.

    Args:
        name: name of the model; its Hub name once it is pushed.
        settings: the training settings to show, in order.
        results: the output of `evaluate_tasks` for the ladder or the grid; may be empty.
        costs: the output of `measure_costs`; may be empty.
        command: the command that trained the model.
        base_model: Hub name of the backbone, if any.
        datasets: Hub names of the training data, if any.
        license: licence of the model, if any.
    """

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    command: str = ""
    base_model: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None


def build_card(model: TwoDMSEModel, objective: Objective, run: Run) -> ModelCard:
    """Make the card: metadata with every size of the ladder, scores, costs, settings, and how to load a size."""
    data = ModelCardData(
        model_name=run.name,
        base_model=run.base_model,
        datasets=list(run.datasets) or None,
        license=run.license,
        library_name="transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "matryoshka", "2dmse", "custom_code"],
        eval_results=_eval_results(run.results, objective.ladder) or None,
    )
    example = objective.ladder[len(objective.ladder) // 2]
    return ModelCard.from_template(
        data,
        template_path=_TEMPLATE,
        name=run.name,
        num_layers=model.num_layers,
        hidden_size=model.config.hidden_size,
        example_layers=example.num_layers,
        example_dim=example.dim,
        scores=_ladder_table(run.results, run.costs, objective.ladder),
        grids=_grid_tables(run.results),
        command=run.command,
        settings="\n".join(f"- {key}: `{value}`" for key, value in run.settings.items()),
        objective=objective.name,
        citation=CITATIONS[objective.name],
    )


def write_card(folder: str | os.PathLike, card: ModelCard) -> None:
    """Write the card to the README.md of a model folder, where the Hub looks for it."""
    card.save(os.path.join(folder, "README.md"))


def measure_costs(
    model: TwoDMSEModel, sizes: Sequence[Size], texts: Sequence[str], max_length: int | None = None, runs: int = 3
) -> dict:
    """Measure the costs of each size.

    Args:
        model: the model.
        sizes: the sizes.
        texts: the texts to encode for the timing.
        max_length: maximum length of a text in tokens.
        runs: how often the texts are encoded; depths take turns.

    Returns:
        for each size, as in `{"2x64": {"parameters": ..., "megabytes": ..., "relative_time": ...}}`, the number of
        parameters, the megabytes of the weights, and the median encoding time relative to full depth.
    """
    layers = layers_of(model.backbone, model.config.layer_stack)
    held = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(held)
    width = next(model.parameters()).element_size()
    seconds: dict[int, list[float]] = {n: [] for n in sorted({size.num_layers for size in sizes} | {model.num_layers})}
    for _ in range(runs):
        for n, times in seconds.items():
            start = time.perf_counter()
            model.encode(texts, num_layers=n, max_length=max_length, show_progress_bar=False)
            times.append(time.perf_counter() - start)
    full = statistics.median(seconds[model.num_layers])
    return {
        str(size): {
            "parameters": (parameters := outside + sum(held[: size.num_layers])),
            "megabytes": parameters * width / 1e6,
            "relative_time": statistics.median(seconds[size.num_layers]) / full,
        }
        for size in sizes
    }


def _ladder_table(results: dict, costs: dict, ladder: Sequence[Size]) -> str:
    tasks = main_scores(results)
    titles = [f"{task}, {metric_name(task, results)}" for task in tasks]
    titles += ["parameters", "MB on disk", "encode time"] if costs else []
    if not titles:
        return "Not evaluated."
    lines = [f"| size | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for size in map(str, ladder):
        cells = [f"{scores[size]:.4f}" for scores in tasks.values()]
        if costs:
            cost = costs[size]
            cells += [f"{cost['parameters'] / 1e6:.1f} M", f"{cost['megabytes']:.0f}", f"{cost['relative_time']:.2f}"]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _grid_tables(results: dict) -> str:
    tables = []
    for task, scores in main_scores(results).items():
        sizes = [tuple(map(int, size.split("x"))) for size in scores]
        layers, dims = sorted({n for n, _ in sizes}), sorted({d for _, d in sizes})
        if len(scores) != len(layers) * len(dims):
            continue
        lines = [f"{task}, {metric_name(task, results)}:", "", f"| layers | {' | '.join(map(str, dims))} |"]
        lines.append("|---|" + "---:|" * len(dims))
        for n in layers:
            lines.append(f"| {n} | " + " | ".join(f"{scores[str(Size(n, d))]:.4f}" for d in dims) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _eval_results(results: dict, ladder: Sequence[Size]) -> list[EvalResult]:
    found = []
    for task, scores in main_scores(results).items():
        facts = _task_facts(task, results)
        found += [
            EvalResult(
                **facts,
                metric_name=f"{metric_name(task, results)} at {size}",
                metric_value=scores[str(size)],
            )
            for size in ladder
        ]
    return found


def _task_facts(task: str, results: dict) -> dict[str, Any]:
    """What the Hub shows of a task."""
    if task in results.get("mteb", {}):
        facts = results["mteb"][task]
        kind, dataset, name, metric = facts["type"], facts["dataset"], f"MTEB {task}", facts["metric"]
        return {"task_type": kind, "dataset_type": dataset, "dataset_name": name, "metric_type": metric}
    sts = metric_name(task, results) == "Spearman"
    return {
        "task_type": "sentence-similarity" if sts else "text-retrieval",
        "task_name": "STS" if sts else "Retrieval",
        "dataset_type": task,
        "dataset_name": task,
        "metric_type": "spearman_cosine" if sts else "ndcg_at_10",
    }


_MTEB_TITLE = "## MTEB"


def add_mteb(folder: str | os.PathLike, results: dict, sizes: Sequence[Size]) -> None:
    """Put the scores of MTEB's tasks into the card of a model folder, instead of those that it may have.

    Args:
        folder: the folder, which has a README.md.
        results: results with `mteb`, of `trainer.mteb_tasks.evaluate_mteb`.
        sizes: the sizes to show.
    """
    card, mteb = ModelCard.load(os.path.join(folder, "README.md")), {"mteb": results["mteb"]}
    kept = [result for result in card.data.eval_results or [] if not result.dataset_name.startswith("MTEB ")]
    card.data.eval_results = kept + _eval_results(mteb, sizes)
    if not card.data.model_name:
        card.data.model_name = os.path.basename(os.path.realpath(folder))
    before, _, after = card.text.partition(f"\n{_MTEB_TITLE}\n")
    rest = after.partition("\n## ")[2]
    section = f"{_MTEB_TITLE}\n\n{_ladder_table(mteb, {}, sizes)}\n"
    card.text = f"{before.rstrip()}\n\n{section}" + (f"\n## {rest}" if rest else "")
    write_card(folder, card)
