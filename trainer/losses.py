"""Base losses: pure functions of unit vectors, one per equation. They see one size at a time and know no layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

SCALE = 20.0


@dataclass(frozen=True)
class Rows:
    """The roles of the rows of a batch of texts.

    The columns come one after another: all anchors, then all positives, then all first negatives, and so on; or all
    first sentences, then all second ones. Row i of the first column belongs to row i of the second. Columns of
    negatives may be shorter, because each of their rows is a negative of every anchor.

    Args:
        counts: number of rows of each column.
        scores: (counts[0],), the similarity of each sentence pair; None for anchors and positives.
        unlabeled: number of rows of texts without labels, after the last column. The base losses do not see them.
    """

    counts: tuple[int, ...]
    scores: torch.Tensor | None = None
    unlabeled: int = 0

    def labeled_states(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) without the unlabeled rows."""
        return states[: sum(self.counts)] if self.unlabeled else states

    def unlabeled_states(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) of the unlabeled rows only."""
        return states[sum(self.counts) :]

    def columns(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(sum of counts, dim), split into one tensor per column."""
        return embeddings.split(self.counts)


def infonce(
    anchors: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor, scale: float = SCALE
) -> torch.Tensor:
    """Cross-entropy of each anchor's positive among all candidates (van den Oord et al. 2018, eq. 4; SimCSE, eq. 5).

        loss = -1/Q sum_i log( exp(s cos(a_i, c_t(i))) / sum_j exp(s cos(a_i, c_j)) )

    Args:
        anchors: (Q, dim), unit norm.
        candidates: (M, dim), unit norm: the positives of all rows, then the hard negatives.
        targets: (Q,), the row of `candidates` that is the anchor's positive.
        scale: s, the factor of the similarities (1 / temperature).

    Returns:
        the loss, a scalar.

    Examples:
        >>> a = torch.eye(2)
        >>> round(infonce(a, a, torch.tensor([0, 1]), scale=1.0).item(), 4)  # ln(1 + e) - 1
        0.3133
    """
    return F.cross_entropy(scale * anchors @ candidates.T, targets)


def cosent(left: torch.Tensor, right: torch.Tensor, scores: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """Ranking loss over the cosines of sentence pairs (CoSENT, Su 2022).

        loss = log(1 + sum over pairs with score_i > score_j of exp(s (cos_j - cos_i)))

    Args:
        left: (B, dim), unit norm.
        right: (B, dim), unit norm.
        scores: (B,); only their order matters.
        scale: s, the factor of the cosines.

    Returns:
        the loss, a scalar.
    """
    return _rank_loss((left * right).sum(dim=-1), scores, scale)


def angle(left: torch.Tensor, right: torch.Tensor, scores: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """The ranking loss of `cosent` over angle differences in complex space (AnglE, Li and Li 2023, eq. 5 to 7).

    The first half of each vector contains the real parts, the second half the imaginary parts. At dimension d, the
    halves have d/2 columns, so the pairs of dimensions differ from size to size.

    Args:
        left: (B, dim), dim even.
        right: (B, dim).
        scores: (B,); only their order matters.
        scale: s, the factor of the angle differences.

    Returns:
        the loss, a scalar.
    """
    return _rank_loss(angle_difference(left, right), scores, scale)


def angle_difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(B,): |sum of real and imaginary parts of (z / w) (|w| / |z|)|, for the vectors z and w as complex numbers."""
    a, b = left.chunk(2, dim=-1)
    c, d = right.chunk(2, dim=-1)
    norm_z = (a**2 + b**2).sum(dim=-1, keepdim=True).sqrt()
    norm_w = (c**2 + d**2).sum(dim=-1, keepdim=True).sqrt()
    real, imaginary = (a * c + b * d) / norm_w**2, (b * c - a * d) / norm_w**2
    return (torch.cat((real, imaginary), dim=-1) * (norm_w / norm_z)).sum(dim=-1).abs()


def cosine_mse(left: torch.Tensor, right: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The mean over pairs of (cos_i - score_i)^2 (Reimers and Gurevych 2019, regression objective).

    This is the only loss here that does not couple rows: accumulated batches give the same gradient as one large batch.

    Args:
        left: (B, dim), unit norm.
        right: (B, dim), unit norm.
        scores: (B,), from 0 to 1.

    Returns:
        the loss, a scalar.
    """
    return F.mse_loss((left * right).sum(dim=-1), scores.to(left.dtype))


def _rank_loss(similarity: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    difference = scale * (similarity[None, :] - similarity[:, None])  # [i, j]: sim_j - sim_i
    difference = difference[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat((difference.new_zeros(1), difference)), dim=0)


PAIR_LOSSES = ("infonce",)
SCORE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"cosent": cosent, "angle": angle, "cosine_mse": cosine_mse}
LOSSES = (*PAIR_LOSSES, *SCORE_LOSSES)


def base_loss(name: str, embeddings: torch.Tensor, rows: Rows, scale: float = SCALE) -> torch.Tensor:
    """The loss of one size, loss(n, d).

    Args:
        name: one of `LOSSES`.
        embeddings: (rows, dim) of that size, unit norm.
        rows: the roles of the rows.
        scale: the factor of the similarities; `cosine_mse` has none.

    Returns:
        the loss, a scalar.
    """
    columns = rows.columns(embeddings)
    if name == "infonce":
        targets = torch.arange(len(columns[0]), device=embeddings.device)
        return infonce(columns[0], embeddings[len(columns[0]) :], targets, scale)
    left, right = columns
    scores = cast(torch.Tensor, rows.scores)
    return cosine_mse(left, right, scores) if name == "cosine_mse" else SCORE_LOSSES[name](left, right, scores, scale)
