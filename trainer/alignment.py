"""Alignment losses: what a smaller size learns from a larger one. The teacher is always detached."""

import torch
import torch.nn.functional as F

from .losses import SCALE


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

    Starbucks' retrieval code does this on query-document scores. The diagonal (each row with itself) is left out.

    Args:
        student: (rows, d), teacher: (rows, D), unit norm; d and D may differ.
    """
    teacher = teacher.detach()
    return _kl(_off_diagonal(scale * student @ student.T), _off_diagonal(scale * teacher @ teacher.T))


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


def _off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    size = len(matrix)
    keep = ~torch.eye(size, dtype=torch.bool, device=matrix.device)
    return matrix[keep].view(size, size - 1)


def _kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    student, teacher = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
