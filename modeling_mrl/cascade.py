"""Cascades: each sample goes to the next larger size until one is confident (MRL, section 4.2.1 and appendix D)."""

from collections.abc import Mapping, Sequence

import torch

from .configuration_mrl import Size
from .head import MatryoshkaHead


def confidences(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest probability and its class.

    Args:
        logits: (..., classes).

    Returns:
        (...,) confidences in float64, from 1 / classes to 1, and (...,) classes.
    """
    best = logits.double().softmax(dim=-1).max(dim=-1)
    return best.values, best.indices


def choose_sizes(confidence: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """Index of the size at which each sample stops: the first whose confidence is above its threshold, else the last.

    Args:
        confidence: (sizes, samples).
        thresholds: one for each size but the last.

    Returns:
        (samples,).

    >>> choose_sizes(torch.tensor([[0.9, 0.6, 0.6], [0.8, 0.7, 0.5], [0.9, 0.9, 0.9]]), [0.7, 0.6]).tolist()
    [0, 1, 2]
    """
    levels = torch.tensor([*thresholds, -torch.inf], dtype=torch.float64, device=confidence.device)
    return (confidence.double() > levels[:, None]).to(torch.uint8).argmax(dim=0)


def fit_thresholds(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Thresholds of a cascade, fitted for each pair of neighbouring sizes.

    Each is the smallest threshold in [0, 1] with the best accuracy of "the smaller size if its confidence is above the
    threshold, else the larger size". This accuracy changes only at the confidences of the samples themselves, so trying
    0 and each of them is exact.

    Args:
        logits: (sizes, samples, classes) on data that no size was trained on.
        labels: (samples,).

    Returns:
        One threshold for each size but the last.

    Raises:
        ValueError: there are no labels, or all are of one class, on which no confidence can be judged.
    """
    classes = labels.unique()
    if len(classes) < 2:
        found = f"all {len(labels)} rows are of class {classes[0].item()}" if len(classes) else "there are no rows"
        raise ValueError(f"dataset: {found}; a cascade is fitted on held-out data of at least two classes")
    confidence, predicted = confidences(logits)
    correct = (predicted == labels.to(predicted.device)).long()
    return [_fit_pair(confidence[k], correct[k], correct[k + 1]) for k in range(len(logits) - 1)]


def _fit_pair(confidence: torch.Tensor, smaller: torch.Tensor, larger: torch.Tensor) -> float:
    """The threshold between two sizes, from the smaller one's confidence and the hits of both, (samples,) each."""
    levels, level_of = confidence.unique(return_inverse=True)  # ascending
    # What is gained by passing all samples up to a level to the larger size.
    gains = torch.zeros(len(levels), dtype=torch.long, device=levels.device).index_add_(0, level_of, larger - smaller)
    gains = torch.cat((gains.new_zeros(1), gains.cumsum(dim=0)))
    # The first of equal ones; argmax does not promise which one it returns.
    best = int((gains == gains.max()).nonzero()[0])
    return 0.0 if best == 0 else levels[best - 1].item()


class CascadeWalk:
    """What a cascade has found so far for each sample of a batch.

    Args:
        ladder: the sizes, small to large.
        heads: the head of each exit.
        thresholds: one for each size but the last.
        batch: number of samples.
        device: of the heads.
    """

    def __init__(
        self,
        ladder: Sequence[Size],
        heads: Mapping[int | None, MatryoshkaHead],
        thresholds: Sequence[float],
        batch: int,
        device: torch.device,
    ):
        self._ladder = ladder
        self._heads = heads
        self._levels = [*thresholds, float("-inf")]
        self.batch = batch
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)
        self.sizes, self.dims = torch.zeros_like(self.labels), torch.zeros_like(self.labels)
        self.confidences = torch.zeros(batch, dtype=torch.float64, device=device)

    def visit(self, exit_: int | None, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Take some samples through the sizes of an exit.

        Args:
            exit_: number of layers, None for the end of the backbone.
            states: (rows, D), the samples' pooled states.
            rows: (rows,), the samples' numbers in the batch.

        Returns:
            (rows,) mask of the samples that no size at this exit was confident of.
        """
        left = torch.arange(len(rows), device=rows.device)
        logits: torch.Tensor | None = None
        previous = 0
        for index, (num_layers, dim) in enumerate(self._ladder):
            if num_layers != exit_:
                continue
            logits = self._heads[exit_].widen(states, dim, logits, previous)
            previous = dim
            confidence, labels = confidences(logits)
            sure = confidence > self._levels[index]
            self._note(rows[left[sure]], labels[sure], confidence[sure], index, dim)
            left, states, logits = left[~sure], states[~sure], logits[~sure]
            if not len(left):
                break
        stay = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        stay[left] = True
        return stay

    def _note(self, rows: torch.Tensor, labels: torch.Tensor, confidence: torch.Tensor, index: int, dim: int) -> None:
        self.labels[rows], self.confidences[rows] = labels, confidence
        self.sizes[rows], self.dims[rows] = index, dim


__all__ = ["CascadeWalk", "choose_sizes", "confidences", "fit_thresholds"]
