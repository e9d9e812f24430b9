"""The model card of a training run, made from the results and settings of the run."""

import importlib.metadata
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.backbone import layers_of

from .agreement import count_neighbours
from .citations import CITATIONS
from .evaluation import best_for_cost, main_scores, metric_name
from .objectives import Objective
from .shared.hub import OWNER

_TEMPLATE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "model_cards", "template.md")


@dataclass
class Run:
    """The contents of a card.

    Args:
        name: name of the model.
        repo_id: its Hub name, if it is known; the snippets have a placeholder for the owner otherwise.
        settings: the training settings to show, in order.
        results: the output of `evaluate_tasks` for the ladder or the grid; may be empty.
        costs: the output of `measure_costs`; may be empty.
        command: the command that trained the model.
        base_model: Hub name of the backbone, if any.
        datasets: Hub names of the training data, if any.
        license: licence of the model, if any.
        languages: codes of the languages of the model, if known.
        rows: what the rows of a task are, by its name, where its name does not say so.
        pictures: file in the model's folder and title of each picture.
    """

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    command: str = ""
    base_model: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    languages: Sequence[str] = ()
    repo_id: str | None = None
    rows: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


def build_card(model: TwoDMSEModel, objective: Objective, run: Run) -> ModelCard:
    """Make the card: metadata with every size of the ladder, scores, costs, settings, and how to load a size."""
    ladder = objective.ladder
    name = run.repo_id or run.name
    repo_id = name if "/" in name else f"{OWNER}/{name}"
    data = ModelCardData(
        model_name=name,
        base_model=run.base_model,
        datasets=list(run.datasets) or None,
        language=list(run.languages) or None,
        license=run.license,
        library_name="transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "matryoshka", "2dmse", "custom_code"],
        eval_results=_eval_results(run.results, ladder) or None,
    )
    example = best_for_cost(run.results, ladder)
    return ModelCard.from_template(
        data,
        template_path=_TEMPLATE,
        name=name,
        repo_id=repo_id,
        num_layers=model.num_layers,
        hidden_size=model.config.hidden_size,
        example_layers=example.num_layers,
        example_dim=example.dim,
        facts=_facts(model, run),
        tasks=_task_lines(run.results, model.config.similarity, run.rows),
        scores=_ladder_table(run.results, run.costs, ladder),
        costs=bool(run.costs),
        grids=_grid_tables(run.results),
        pictures="\n\n".join(f"![{title}]({file})" for file, title in run.pictures.items()),
        command=run.command,
        settings="\n".join(f"- {key}: `{value}`" for key, value in run.settings.items()),
        objective=objective.name,
        versions=_versions(),
        normalises=model.config.similarity == "cosine",
        crosses=bool(run.settings.get("cross size weight")),
        citation="\n\n".join(CITATIONS[objective.name]),
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
    for modules in (model.exit_projections, model.exit_gates):
        for place, module in enumerate(modules or ()):  # a cut model has those of its own exits only
            held[place] += sum(parameter.numel() for parameter in module.parameters())
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


def _facts(model: TwoDMSEModel, run: Run) -> str:
    """What a reader must know to use the model, a line each."""
    trained = run.settings.get("max_length")
    lines = {
        "Base model": run.base_model,
        "Languages": ", ".join(run.languages) or None,
        "License": run.license,
        "Pooling": model.config.pooling + ("; mean below the last exit" if model.config.exit_poolings else ""),
        "Similarity function": {"dot": "dot product"}.get(model.config.similarity, model.config.similarity),
        "Prompts (`prompt_name`)": ", ".join(model.config.prompt_notes),
        "Maximum length": f"{model.max_length} tokens" + (f"; trained at up to {trained}" if trained else ""),
    }
    return "\n".join(f"- {title}: {value}" for title, value in lines.items() if value)


def _versions() -> str:
    """Versions of the libraries, those that are installed."""
    found = []
    for name in ("twodmse", "transformers", "sentence-transformers", "torch", "tokenizers", "datasets"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _task_lines(results: dict, similarity: str, meanings: dict[str, str]) -> str:
    """What each task is: its metric and its rows, which are `meanings` where those are given."""
    lines: list[str] = []
    compared = "dot product" if similarity == "dot" else "cosine"
    for name, task in results.get("sts", {}).items():
        rows = f" ({task['n']} rows)" if "n" in task else ""
        lines.append(
            f"{name}: semantic similarity of sentence pairs{rows}; Spearman correlation of {compared} and score"
            + _meaning(name, meanings)
        )
    for name, task in results.get("retrieval", {}).items():
        rows = f" ({task['n_queries']} queries)" if "n_queries" in task else ""
        lines.append(f"{name}: retrieval{rows}; nDCG@10, documents ranked by {compared}{_meaning(name, meanings)}")
    for name, task in results.get("mteb", {}).items():
        lines.append(f"{name}: MTEB's task of type {task['type']}; {task['metric']}")
    if "agreement" in results:
        count = results["agreement"]["n"]
        lines.append(
            f"{_agreement(results)}: of the {count_neighbours(count)} nearest others of each of {count} held-out "
            "documents, as the untrained full size finds them, the share that is found"
        )
    return "\n".join(f"- {line}" for line in lines)


def _meaning(name: str, meanings: dict[str, str]) -> str:
    return f"; {meanings[name]}" if name in meanings else ""


def _agreement(results: dict) -> str:
    """The title of the column of the nearest documents."""
    return f"share of the {count_neighbours(results['agreement']['n'])} nearest"


def _score_columns(results: dict) -> dict[str, dict[str, float]]:
    """The scores of each size by the title of their column; of a training, also those before it."""
    columns: dict[str, dict[str, float]] = {}
    before = main_scores(results.get("before") or {})
    for task, scores in main_scores(results).items():
        title = f"{task}, {metric_name(task, results)}"
        if task in before:
            columns |= {f"{title} before": before[task], f"{title} after": scores}
        else:
            columns[title] = scores
    for when, found in (("before", results.get("before") or {}), ("after", results)):
        if "agreement" in found:
            columns[f"{_agreement(found)} {when}"] = found["agreement"]["overlap@10"]
    return columns


def _ladder_table(results: dict, costs: dict, ladder: Sequence[Size]) -> str:
    columns = _score_columns(results)
    titles = list(columns)
    titles += ["parameters", "MB on disk", "encode time"] if costs else []
    if not titles:
        return "Not evaluated."
    lines = [f"| size | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for size in map(str, ladder):
        cells = [f"{scores[size]:.4f}" for scores in columns.values()]
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
