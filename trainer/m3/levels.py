"""Scoring a LLaVA at every visual level: losses, answers, costs, the oracle and the confidence cascade."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration, visual_output

from .conversations import IGNORED


@dataclass
class LevelScores:
    """The scores of the rows at one level; each is a tensor (rows,) on the CPU.

    Args:
        loss_sum: summed cross-entropy of the answer's tokens.
        tokens: number of tokens of the answer.
        correct: whether greedy decoding would give the answer: each token is the most likely one after those before it.
        confidence: probability of the most likely first token of the answer.
        prompt_tokens: number of tokens before the answer, including visual tokens.
        images: number of images of the row.
    """

    loss_sum: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor
    confidence: torch.Tensor
    prompt_tokens: torch.Tensor
    images: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Fraction of the rows that are correct."""
        return self.correct.double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the tokens of all answers."""
        return (self.loss_sum.double().sum() / self.tokens.sum()).item()


@torch.no_grad()
def score_batch(model: MatryoshkaLlavaForConditionalGeneration, batch: dict) -> dict[int, LevelScores]:
    """The scores of a batch from `ConversationCollator` at each of its levels; the vision tower runs once."""
    states = model.encode_images(batch["pixel_values"]) if "pixel_values" in batch else None
    return {
        size: _score(model, inputs, None if states is None else model.pool_images(states, size), size)
        for size, inputs in batch["levels"].items()
    }


def join_scores(batches: Iterable[dict[int, LevelScores]]) -> dict[int, LevelScores]:
    """Concatenate the scores of several batches."""
    batches = list(batches)
    names = [field.name for field in fields(LevelScores)]
    return {
        size: LevelScores(*(torch.cat([getattr(batch[size], name) for batch in batches]) for name in names))
        for size in batches[0]
    }


def oracle(correct: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest visual tokens that answer each row correctly (Cai et al. 2024, section 4.4).

    This is an upper bound: it uses the correct answer to choose the level.

    Args:
        correct: for each level a tensor (rows,), whether the level answers the row correctly.

    Returns:
        two tensors (rows,): the level, which is the smallest one if none is correct, and whether it is correct.

    Examples:
        >>> oracle({1: torch.tensor([True, False, False]), 9: torch.tensor([True, True, False])})[0].tolist()
        [1, 9, 1]
    """
    sizes = sorted(correct)
    right = torch.stack([correct[size] for size in sizes])
    return torch.tensor(sizes)[right.int().argmax(dim=0)], right.any(dim=0)


def cascade(confidence: dict[int, torch.Tensor], threshold: float) -> torch.Tensor:
    """The first level at which the confidence of each row reaches the threshold; the largest level if none does.

    This extension is not in the paper. The costs of a row include all levels that were tried.

    Args:
        confidence: for each level a tensor (rows,).
        threshold: the confidence to reach.

    Returns:
        a tensor (rows,) of levels.

    Examples:
        >>> cascade({1: torch.tensor([0.9, 0.2, 0.1]), 9: torch.tensor([0.9, 0.8, 0.3])}, threshold=0.5).tolist()
        [1, 9, 9]
    """
    sizes = sorted(confidence)
    sure = torch.stack([confidence[size] >= threshold for size in sizes])
    sure[-1] = True
    return torch.tensor(sizes)[sure.int().argmax(dim=0)]


def level_table(
    model: MatryoshkaLlavaForConditionalGeneration,
    levels: dict[int, LevelScores],
    cascade_threshold: float | None = None,
) -> dict[str, dict[str, float]]:
    """The scores and costs of each level, of the oracle and of the cascade.

    Args:
        model: the model, whose language model decides the costs.
        levels: the scores at each level.
        cascade_threshold: the threshold of the cascade; None for no cascade.

    Returns:
        one entry per level, `oracle`, and `cascade` if there is a threshold. Each has `accuracy`, `loss` (levels only),
        and means over the rows of `visual_tokens` (per image), `sequence_length`, `kv_cache_bytes` and
        `prefill_flops` of the prompt. The cascade's `visual_tokens` and `prefill_flops` are summed over the levels
        that were tried.
    """
    costs = {size: _costs(model, scores, size) for size, scores in levels.items()}
    table = {}
    for size, scores in levels.items():
        means = {name: values.mean().item() for name, values in costs[size].items()}
        table[str(size)] = {"accuracy": scores.accuracy, "loss": scores.loss, **means}
    chosen, right = oracle({size: scores.correct for size, scores in levels.items()})
    table["oracle"] = {"accuracy": right.double().mean().item(), **_mean_costs(costs, chosen)}
    if cascade_threshold is not None:
        chosen = cascade({size: scores.confidence for size, scores in levels.items()}, cascade_threshold)
        picked = torch.stack([levels[int(size)].correct[row] for row, size in enumerate(chosen)])
        table["cascade"] = {"accuracy": picked.double().mean().item(), **_mean_costs(costs, chosen)}
        for name in ("visual_tokens", "prefill_flops"):
            table["cascade"][name] = _mean_of_sum(costs[size][name] * (chosen >= size) for size in costs)
    return table


def _score(model, inputs: dict, visual: torch.Tensor | None, size: int) -> LevelScores:
    given = {} if visual is None else {"mm_encoder_outputs": {"image": visual_output(visual)}}
    texts = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = model.model(**texts, use_cache=False, **given).last_hidden_state
    labels = inputs["labels"][:, 1:]
    answers = labels != IGNORED
    # Logits only of the answers' tokens: those of all tokens would be by far the largest tensor.
    logits = model.lm_head(hidden[:, :-1][answers]).float()
    targets, rows = labels[answers], answers.nonzero()[:, 0]
    empty = torch.zeros(len(labels), device=labels.device)
    losses = empty.index_add(0, rows, F.cross_entropy(logits, targets, reduction="none"))
    wrong = empty.index_add(0, rows, (logits.argmax(dim=-1) != targets).float())
    counts = answers.sum(dim=1)
    first = (counts.cumsum(0) - counts).clamp(max=len(logits) - 1)
    confidence = logits.softmax(dim=-1).amax(dim=-1)[first] * (counts > 0)
    prompt = answers.int().argmax(dim=1) + 1
    images = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1) // size
    return LevelScores(
        *(value.cpu() for value in (losses, counts, (wrong == 0) & (counts > 0), confidence, prompt, images))
    )


def _costs(model, scores: LevelScores, size: int) -> dict[str, torch.Tensor]:
    """The costs of the prompt of each row; each a tensor (rows,)."""
    text = scores.prompt_tokens - scores.images * size
    rows = [
        model.prefill_cost(words, size, images)
        for words, images in zip(text.tolist(), scores.images.tolist(), strict=True)
    ]
    columns = torch.tensor(rows, dtype=torch.float64).T
    names = ("sequence_length", "kv_cache_bytes", "prefill_flops")
    visual = torch.full((len(rows),), float(size), dtype=torch.float64)
    return {"visual_tokens": visual, **dict(zip(names, columns, strict=True))}


def _mean_costs(costs: dict[int, dict[str, torch.Tensor]], chosen: torch.Tensor) -> dict[str, float]:
    """The costs of each row at the level that was chosen for it, averaged over the rows."""
    names = next(iter(costs.values()))
    return {name: _mean_of_sum(costs[size][name] * (chosen == size) for size in costs) for name in names}


def _mean_of_sum(parts: Iterable[torch.Tensor]) -> float:
    return sum(parts, start=torch.zeros(())).mean().item()
