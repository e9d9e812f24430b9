"""Alignment losses: what a smaller size learns from a larger one. The teacher is always detached."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .losses import SCALE

# Similarities that score_kl holds at once (1 MB in float32).
_BLOCK_SCORES = 2**18


def feature_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) between softmaxes over the vectors' own dimensions, mean over rows.

    2DMSE (eq. 4) takes it on raw pooled states, Starbucks' STS code on truncated, normalised embeddings.

    Args:
        student, teacher: (rows, dim), the same dim.

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> feature_kl(x, x).item()
    0.0
    """
    return _kl(student, teacher.detach())


def score_kl(student: torch.Tensor, teacher: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """KL(teacher || student) between softmaxes over each row's similarities to all other rows, mean over rows.

    Starbucks' retrieval code does this on query-document scores. The diagonal (each row with itself) is left out. Many
    rows are taken in blocks whose matrices are made again in the backward pass, so that none is kept.

    Args:
        student: (rows, d), teacher: (rows, D), unit norm; d and D may differ.
    """
    teacher, rows = teacher.detach(), len(student)
    block = max(1, _BLOCK_SCORES // rows)
    if rows <= block:
        return _score_kl_rows(student, teacher, scale, 0, rows)
    shares = [
        checkpoint(_score_kl_rows, student, teacher, scale, start, block, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, rows, block)
    ]
    return torch.stack(shares).sum()


def _score_kl_rows(student: torch.Tensor, teacher: torch.Tensor, scale: float, start: int, count: int) -> torch.Tensor:
    """What `count` rows from `start` on add to the mean over all rows."""
    rows = slice(start, start + count)
    scores = [_without_self(scale * side[rows] @ side.T, start) for side in (student, teacher)]
    return _kl(*scores) * (len(scores[0]) / len(student))


def pca_distance(state: torch.Tensor, dim: int) -> torch.Tensor:
    """ESE's learn-to-compress (Li et al. 2024, section 3.2): mean squared error plus KL to a PCA of the state.

    Args:
        state: (rows, hidden), pooled, raw; its first `dim` columns learn, the target is detached.
    """
    target = pca(state.detach(), dim)
    return F.mse_loss(state[:, :dim], target) + _kl(state[:, :dim], target)


def pca(state: torch.Tensor, dim: int) -> torch.Tensor:
    """The state on the `dim` strongest directions of softmax(X^T X / sqrt(H)), (rows, dim).

    ESE's code draws a random low-rank SVD; this one is exact, and each direction's sign is fixed by its largest
    entry, so that the target is the same in every run and process.
    """
    dependencies = torch.softmax(state.T @ state / state.shape[1] ** 0.5, dim=-1)
    directions, strengths, _ = torch.linalg.svd(dependencies)
    directions = directions[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return state @ (directions * largest.sign() * strengths[:dim])


def _without_self(scores: torch.Tensor, start: int) -> torch.Tensor:
    """Row i's score with itself, in column start + i, gets a value whose softmax and gradient are zero."""
    scores.diagonal(offset=start).fill_(-1e4)
    return scores


def _kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    student, teacher = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
