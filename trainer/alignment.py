"""Alignment losses: a smaller size (the student) learns from a larger one (the teacher).

The teacher is detached, except in the forms of `feature_kl` in which the authors do not detach it.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .losses import ABSENT, SCALE

# Similarities that score_kl holds in memory at once (1 MB in float32).
_BLOCK_SCORES = 2**18


def feature_kl(student: torch.Tensor, teacher: torch.Tensor, detach: bool = True) -> torch.Tensor:
    """KL(teacher || student) between the softmaxes over the dimensions of each vector, mean over rows.

    2DMSE (eq. 4) applies it to raw pooled states of the full width. Starbucks' STS code (sts/starbucks_loss.py) takes
    the softmax of raw pooled states that are cut to the student's dimensions, without normalizing them. Neither
    detaches the teacher. The setting `feature_kl_form` chooses what the objectives pass to this function.

    Args:
        student: (rows, dim).
        teacher: (rows, dim).
        detach: whether the teacher gets no gradient.

    Returns:
        the divergence, a scalar.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> feature_kl(x, x).item()
        0.0
    """
    return _kl(student, teacher.detach() if detach else teacher)


def score_kl(student: torch.Tensor, teacher: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """KL(teacher || student) between the softmaxes over each row's similarities to all other rows, mean over rows.

    The diagonal (each row with itself) is left out. Many rows are processed in blocks. The matrices of a block are
    computed again in the backward pass, so none is kept.

    Args:
        student: (rows, d).
        teacher: (rows, D); D may differ from d.
        scale: the factor of the similarities (1 / temperature).

    Returns:
        the divergence, a scalar.
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
    """The contribution of `count` rows, from row `start`, to the mean over all rows."""
    rows = slice(start, start + count)
    scores = [_without_self(scale * side[rows] @ side.T, start) for side in (student, teacher)]
    return _kl(*scores) * (len(scores[0]) / len(student))


def query_kl(student: torch.Tensor, teacher: torch.Tensor, queries: int, scale: float = SCALE) -> torch.Tensor:
    """KL(teacher || student) between the softmaxes over each query's similarities to all documents, mean over queries.

    Starbucks' retrieval code aligns every size with the full size in this way.

    Args:
        student: (rows, d), the queries (or anchors) and after them the documents.
        teacher: (rows, D); D may differ from d.
        queries: number of queries.
        scale: the factor of the similarities (1 / temperature).

    Returns:
        the divergence, a scalar.
    """
    scores = [scale * side[:queries] @ side[queries:].T for side in (student, teacher.detach())]
    return _kl(*scores)


def embedding_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each vector to the teacher's, mean over rows.

    Distillation to an embedding, as in the training of jina-embeddings-v5 and of the models of Reimers and Gurevych
    (2020), which use the squared error: for unit vectors it is twice this distance.

    Args:
        student: (rows, dim), unit norm.
        teacher: (rows, dim), unit norm: the teacher's first dimensions.

    Returns:
        the distance, a scalar from 0 to 2.
    """
    return 1 - (student * teacher.detach()).sum(dim=-1).mean()


def pca_distance(state: torch.Tensor, dim: int) -> torch.Tensor:
    """ESE's learn-to-compress (Li et al. 2024, section 3.2): mean squared error plus KL to a PCA of the state.

    Args:
        state: (rows, hidden), raw pooled states; the first `dim` columns learn, the target is detached.
        dim: number of columns.

    Returns:
        the distance, a scalar.
    """
    target = pca(state.detach(), dim)
    return F.mse_loss(state[:, :dim], target) + _kl(state[:, :dim], target)


def pca(state: torch.Tensor, dim: int) -> torch.Tensor:
    """The state projected on the `dim` strongest directions of softmax(X^T X / sqrt(H)).

    ESE's code uses a randomized low-rank SVD. This one is exact, and the largest entry of each direction fixes its
    sign, so the target is the same in every run and process.

    Args:
        state: (rows, hidden), X.
        dim: number of directions.

    Returns:
        (rows, dim).
    """
    dependencies = torch.softmax(state.T @ state / state.shape[1] ** 0.5, dim=-1)
    directions, strengths, _ = torch.linalg.svd(dependencies)
    directions = directions[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return state @ (directions * largest.sign() * strengths[:dim])


def _without_self(scores: torch.Tensor, start: int) -> torch.Tensor:
    """Replace the score of row i with itself, in column start + i, by a value whose softmax and gradient are zero."""
    scores.diagonal(offset=start).fill_(ABSENT)
    return scores


def _kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    student, teacher = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
