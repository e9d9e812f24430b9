"""The model card of a training run, assembled from what the run itself knows."""

import os
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_2dmse import Size, TwoDMSEModel

from .evaluation import main_scores
from .objectives import Objective

CITATIONS = {
    "2dmse": "Li et al. 2024, 2D Matryoshka Sentence Embeddings, arXiv:2402.14776",
    "starbucks": "Zhuang et al. 2024, Starbucks: Improved Training for 2D Matryoshka Embeddings, arXiv:2410.13230",
    "matryoshka": "Kusupati et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147",
    "espresso": "Li et al. 2024, ESE: Espresso Sentence Embeddings, arXiv:2402.14776v3",
    "separate": "Zhuang et al. 2024, Starbucks: Improved Training for 2D Matryoshka Embeddings, arXiv:2410.13230",
}


def build_card(
    name: str,
    model: TwoDMSEModel,
    objective: Objective,
    settings: dict[str, object],
    results: dict,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> ModelCard:
    """A model card with metadata, the scores of the ladder, the recipe, and how to load a size.

    Args:
        name: of the model.
        settings: the training settings to show, in order.
        results: as `evaluate_tasks` returns them; may be empty.
        base_model: Hub name of the backbone, where it has one.
        datasets: Hub names of the training data, where they have one.
    """
    data = ModelCardData(
        model_name=name,
        base_model=base_model,
        datasets=list(datasets) or None,
        library_name="transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "matryoshka", "2dmse", "custom_code"],
        eval_results=_eval_results(results, objective.ladder) or None,
    )
    example = objective.ladder[0]
    scores = _scores(results, objective.ladder)
    recipe = "\n".join(f"- {key}: `{value}`" for key, value in settings.items())
    body = f"""# {name}

An elastic sentence encoder: one model with {model.num_layers} transformer layers and {model.config.hidden_size}
dimensions, from which any number of layers and any number of leading dimensions is taken when it is loaded or called.

## Use

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, num_layers={example.num_layers})
embeddings = model.encode(["a text"], dim={example.dim})  # runs {example.num_layers} layers
```

## Scores

{scores}

## Training

{recipe}

Objective: `{objective.name}`, {CITATIONS[objective.name]}.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def write_card(folder: str, card: ModelCard) -> None:
    card.save(os.path.join(folder, "README.md"))


def _scores(results: dict, ladder: Sequence[Size]) -> str:
    tasks = main_scores(results)
    if not tasks:
        return "Not evaluated."
    titles = [f"{task} ({'Spearman' if task in results.get('sts', {}) else 'nDCG@10'})" for task in tasks]
    lines = [f"| size | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    lines += [f"| {' | '.join([str(s), *(f'{task[str(s)]:.4f}' for task in tasks.values())])} |" for s in ladder]
    return "\n".join(lines)


def _eval_results(results: dict, ladder: Sequence[Size]) -> list[EvalResult]:
    found = []
    for task, scores in main_scores(results).items():
        sts = task in results.get("sts", {})
        found += [
            EvalResult(
                task_type="sentence-similarity" if sts else "text-retrieval",
                task_name="STS" if sts else "Retrieval",
                dataset_type=task,
                dataset_name=task,
                metric_type="spearman_cosine" if sts else "ndcg_at_10",
                metric_name=f"{'Spearman' if sts else 'nDCG@10'} at {size}",
                metric_value=scores[str(size)],
            )
            for size in ladder
        ]
    return found
