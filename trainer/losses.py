"""Base losses: pure functions of embeddings, one per equation. They see one size at a time and know no layers.

Embeddings are of unit norm if they are compared by cosine, and not if they are compared by dot product.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from .choices import TEACHER_LOSSES

SCALE = 20.0
# The scale that is used if none is given: dot products are larger than cosines.
SCALES = {"cosine": SCALE, "dot": 1.0}
# A score that a softmax gives a share of 0, and that is finite, so that no product with the share is undefined.
ABSENT = -1e30


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
        teacher_scores: (candidates,), the teacher's score of each row after the first column with its own anchor.
        owners: (candidates,), int64, the number of that anchor.
        guide: (rows without the unlabeled ones, width), the embeddings of a guide model, whose dot products tell which
            candidates are false negatives.
    """

    counts: tuple[int, ...]
    scores: torch.Tensor | None = None
    unlabeled: int = 0
    teacher_scores: torch.Tensor | None = None
    owners: torch.Tensor | None = None
    guide: torch.Tensor | None = None

    @classmethod
    def of_batch(cls, batch: dict, guide: torch.Tensor | None = None) -> "Rows":
        """The roles of the rows of a batch of `PairCollator`, whose fields are removed from it; ValueError for a batch
        of another collator."""
        if "counts" not in batch:
            raise ValueError("data_collator: its batches have no counts; leave it out, or use that of trainer.data")
        names = ("scores", "teacher_scores", "owners")
        found = {name: batch.pop(name) for name in names if name in batch}
        return cls(tuple(batch.pop("counts")), unlabeled=batch.pop("unlabeled", 0), guide=guide, **found)

    @functools.cached_property
    def false_negatives(self) -> torch.Tensor | None:
        """(anchors, candidates): whether the guide puts a candidate nearer to an anchor than the anchor's positive.

        GISTEmbed (Solatorio 2024, section 3) leaves them out of the loss. None without a guide.
        """
        if self.guide is None:
            return None
        scores = self.guide[: self.counts[0]] @ self.guide[self.counts[0] :].T
        return scores > scores.diagonal()[:, None]

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
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    targets: torch.Tensor,
    scale: float = SCALE,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each anchor's positive among all candidates (van den Oord et al. 2018, eq. 4; SimCSE, eq. 5).

        loss = -1/Q sum_i log( exp(s cos(a_i, c_t(i))) / sum_j exp(s cos(a_i, c_j)) )

    Args:
        anchors: (Q, dim), unit norm.
        candidates: (M, dim), unit norm: the positives of all rows, then the hard negatives.
        targets: (Q,), the row of `candidates` that is the anchor's positive.
        scale: s, the factor of the similarities (1 / temperature).
        hidden: (Q, M), the candidates that are left out of an anchor's sum.

    Returns:
        the loss, a scalar.

    Examples:
        >>> a = torch.eye(2)
        >>> round(infonce(a, a, torch.tensor([0, 1]), scale=1.0).item(), 4)  # ln(1 + e) - 1
        0.3133
    """
    scores = scale * anchors @ candidates.T
    return F.cross_entropy(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), targets)


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


def margin_mse(
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    owners: torch.Tensor,
    teacher_scores: torch.Tensor,
    scale: float = SCALE,
) -> torch.Tensor:
    """Mean squared error of margins to those of a teacher (Margin-MSE, Hofstätter et al. 2020, eq. 8).

        loss = mean over negatives n, with anchor a and positive p, of (s (a . p - a . n) - (t_p - t_n))^2

    Args:
        anchors: (..., Q, dim).
        candidates: (..., M, dim): the positives of all anchors in order, then the negatives.
        owners: (M,), int64, the anchor of each candidate.
        teacher_scores: (M,), t, the teacher's score of each candidate with its anchor.
        scale: s, the factor of the similarities.

    Returns:
        (...): the loss; 0 if there are no negatives.

    Examples:
        >>> a, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> margin_mse(a, c, torch.tensor([0, 0]), torch.tensor([5.0, 2.0]), scale=1.0).item()  # (1 - 3)^2
        4.0
    """
    count = anchors.shape[-2]

    def margins(scores: torch.Tensor) -> torch.Tensor:
        return scores.index_select(-1, owners[count:]) - scores[..., count:]

    student = margins(scale * _own_similarities(anchors, candidates, owners))
    errors = (student - margins(teacher_scores.to(student.dtype))).square()
    return errors.sum(dim=-1) / max(1, errors.shape[-1])


def distill_kl(
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    owners: torch.Tensor,
    teacher_scores: torch.Tensor,
    counts: tuple[int, ...],
    scale: float = SCALE,
) -> torch.Tensor:
    """KL(teacher || student) between the softmaxes over each anchor's own candidates, mean over anchors.

    The distillation of a cross-encoder's scores by listwise KL (Lin et al. 2020; RocketQAv2, Ren et al. 2021, eq. 4).

    Args:
        anchors: (..., Q, dim).
        candidates: (..., M, dim).
        owners: (M,), int64, the anchor of each candidate.
        teacher_scores: (M,), the teacher's score of each candidate with its anchor, whose temperature is 1.
        counts: the candidates come in columns of these lengths, each with at most one candidate of an anchor.
        scale: the factor of the student's similarities (1 / temperature).

    Returns:
        (...): the divergence.

    Examples:
        >>> a, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> distill_kl(a, c, torch.tensor([0, 0]), torch.tensor([3.0, 2.0]), (1, 1), scale=1.0).item()
        0.0
    """
    # Made of the device's own numbers, so that no copy to a GPU is waited for.
    columns = torch.cat([owners.new_full((count,), column) for column, count in enumerate(counts)])
    place = owners * len(counts) + columns

    def log_shares(scores: torch.Tensor) -> torch.Tensor:
        table = scores.new_full((*scores.shape[:-1], anchors.shape[-2] * len(counts)), ABSENT)
        return F.log_softmax(table.index_copy(-1, place, scores).unflatten(-1, (-1, len(counts))), dim=-1)

    student = log_shares(scale * _own_similarities(anchors, candidates, owners))
    teacher = log_shares(teacher_scores.to(student.dtype))
    return (teacher.exp() * (teacher - student)).sum(dim=(-2, -1)) / anchors.shape[-2]


def _own_similarities(anchors: torch.Tensor, candidates: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """(..., M), the similarity of each candidate with its own anchor."""
    return (anchors.index_select(-2, owners) * candidates).sum(dim=-1)


def _rank_loss(similarity: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    difference = scale * (similarity[None, :] - similarity[:, None])  # [i, j]: sim_j - sim_i
    difference = difference[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat((difference.new_zeros(1), difference)), dim=0)


SCORE_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"cosent": cosent, "angle": angle, "cosine_mse": cosine_mse}


def base_loss(name: str, embeddings: torch.Tensor, rows: Rows, scale: float = SCALE) -> torch.Tensor:
    """The loss of one size, loss(n, d).

    Args:
        name: one of `choices.LOSSES`.
        embeddings: (rows, dim) of that size.
        rows: the roles of the rows.
        scale: the factor of the similarities; `cosine_mse` has none.

    Returns:
        the loss, a scalar.
    """
    columns = rows.columns(embeddings)
    if name == "infonce":
        targets = torch.arange(len(columns[0]), device=embeddings.device)
        return infonce(columns[0], embeddings[len(columns[0]) :], targets, scale, rows.false_negatives)
    if name in TEACHER_LOSSES:
        return teacher_loss(name, embeddings, rows, scale)
    left, right = columns
    scores = cast(torch.Tensor, rows.scores)
    return cosine_mse(left, right, scores) if name == "cosine_mse" else SCORE_LOSSES[name](left, right, scores, scale)


def teacher_loss(name: str, embeddings: torch.Tensor, rows: Rows, scale: float = SCALE) -> torch.Tensor:
    """The loss of one size or several, (...), for embeddings (..., rows, dim); the arguments are as in `base_loss`."""
    anchors, candidates = embeddings.split((rows.counts[0], sum(rows.counts[1:])), dim=-2)
    owners, scores = cast(torch.Tensor, rows.owners), cast(torch.Tensor, rows.teacher_scores)
    if name == "margin_mse":
        return margin_mse(anchors, candidates, owners, scores, scale)
    return distill_kl(anchors, candidates, owners, scores, rows.counts[1:], scale)
