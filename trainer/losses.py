"""Base losses: pure functions of unit vectors, one an equation. They see one size at a time and know no layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SCALE = 20.0


@dataclass(frozen=True)
class Rows:
    """What the rows of a batch of texts are to each other.

    Args:
        counts: rows of each column, which stand one behind the other: all anchors, then all positives, then all first
            negatives, ...; or all first sentences, then all second ones. Row i of the first column belongs to row i of
            the second; columns of negatives may be shorter, since they are negatives of every anchor.
        scores: (counts[0],) similarity of each sentence pair, None for anchors and positives.
        unlabeled: rows of texts without labels behind the last column, which no base loss sees.
    """

    counts: tuple[int, ...]
    scores: torch.Tensor | None = None
    unlabeled: int = 0

    def labelled(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) without the unlabeled rows."""
        return states[: sum(self.counts)] if self.unlabeled else states

    def unlabeled_states(self, states: torch.Tensor) -> torch.Tensor:
        """The unlabeled rows alone."""
        return states[sum(self.counts) :]

    def columns(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(sum of counts, dim) as one tensor a column."""
        return embeddings.split(self.counts)


def infonce(
    anchors: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor, scale: float = SCALE
) -> torch.Tensor:
    """Cross-entropy of each anchor's positive among all candidates (van den Oord et al. 2018, eq. 4; SimCSE, eq. 5).

    loss = -1/Q sum_i log( exp(s cos(a_i, c_t(i))) / sum_j exp(s cos(a_i, c_j)) )

    Args:
        anchors: (Q, dim), unit norm.
        candidates: (M, dim), unit norm: positives of all rows, then hard negatives.
        targets: (Q,), row of `candidates` that is the anchor's positive.

    >>> a = torch.eye(2)
    >>> round(infonce(a, a, torch.tensor([0, 1]), scale=1.0).item(), 4)  # ln(1 + e) - 1
    0.3133
    """
    return F.cross_entropy(scale * anchors @ candidates.T, targets)


def cosent(left: torch.Tensor, right: torch.Tensor, scores: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """log(1 + sum over pairs with score_i > score_j of exp(s (cos_j - cos_i))) (CoSENT, Su 2022).

    Args:
        left, right: (B, dim), unit norm.
        scores: (B,); only their order counts.
    """
    return _rank_loss((left * right).sum(dim=-1), scores, scale)


def angle(left: torch.Tensor, right: torch.Tensor, scores: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """The same ranking over angle differences in complex space (AnglE, Li and Li 2023, eq. 5 to 7).

    The first half of each vector that is given is read as real parts, the second as imaginary ones, so that at size
    d the halves are d/2 wide: the pairing of dimensions differs from size to size.

    Args:
        left, right: (B, dim), dim even.
    """
    return _rank_loss(angle_difference(left, right), scores, scale)


def angle_difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """|sum of real and imaginary parts of (z / w) (|w| / |z|)|, (B,), for z, w read from halves of left and right."""
    a, b = left.chunk(2, dim=-1)
    c, d = right.chunk(2, dim=-1)
    norm_z = (a**2 + b**2).sum(dim=-1, keepdim=True).sqrt()
    norm_w = (c**2 + d**2).sum(dim=-1, keepdim=True).sqrt()
    real, imaginary = (a * c + b * d) / norm_w**2, (b * c - a * d) / norm_w**2
    return (torch.cat((real, imaginary), dim=-1) * (norm_w / norm_z)).sum(dim=-1).abs()


def cosine_mse(left: torch.Tensor, right: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """mean over pairs of (cos_i - score_i)^2; scores in [0, 1] (Reimers and Gurevych 2019, regression objective).

    The one loss here that does not couple rows, so that accumulated batches equal one large batch.
    """
    return F.mse_loss((left * right).sum(dim=-1), scores.to(left.dtype))


def _rank_loss(similarity: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    difference = scale * (similarity[None, :] - similarity[:, None])  # [i, j]: sim_j - sim_i
    difference = difference[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat((difference.new_zeros(1), difference)), dim=0)


PAIR_LOSSES = ("infonce",)
SCORE_LOSSES = {"cosent": cosent, "angle": angle, "cosine_mse": cosine_mse}
LOSSES = (*PAIR_LOSSES, *SCORE_LOSSES)


def base_loss(name: str, embeddings: torch.Tensor, rows: Rows, scale: float = SCALE) -> torch.Tensor:
    """loss(n, d): the named loss on the embeddings of one size, (rows, dim), unit norm."""
    columns = rows.columns(embeddings)
    if name == "infonce":
        targets = torch.arange(len(columns[0]), device=embeddings.device)
        return infonce(columns[0], embeddings[len(columns[0]) :], targets, scale)
    if name == "cosine_mse":
        return cosine_mse(*columns, rows.scores)
    return SCORE_LOSSES[name](*columns, rows.scores, scale)
