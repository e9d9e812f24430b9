"""The losses of several sizes at once: the sizes are stacked, so that a step launches few large kernels.

Each function is the one of the same name in `losses` and `alignment`, with a first dimension for the sizes. A size's
vectors are its first dimensions, followed by zeros up to the largest dim, which change neither norms nor products.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from modeling_2dmse.packing import to_device

from .choices import TEACHER_LOSSES
from .losses import ABSENT, SCALE, Rows, teacher_loss


def to_embeddings(states: torch.Tensor, dims: Sequence[int], similarity: str) -> torch.Tensor:
    """The embeddings of several sizes.

    Args:
        states: (S, rows, hidden), the pooled states of each size's exit.
        dims: the dim of each size.
        similarity: `cosine` or `dot`; embeddings are only normalised for `cosine`.

    Returns:
        (S, rows, largest dim) in float32, zero after each size's own dim.
    """
    largest = max(dims)
    states = states[..., :largest].float()
    if min(dims) < largest:
        columns = torch.arange(largest, device=states.device)
        states = states * (columns < _numbers(dims, states)[:, None])[:, None]
    return states if similarity == "dot" else F.normalize(states, dim=-1)


def base_loss(
    name: str, embeddings: torch.Tensor, dims: Sequence[int], rows: Rows, scale: float = SCALE
) -> torch.Tensor:
    """(S,), the base loss of each size.

    Args:
        name: one of `choices.LOSSES`.
        embeddings: (S, rows, largest dim), of `to_embeddings`.
        dims: the dim of each size.
        rows: the roles of the rows.
        scale: the factor of the similarities; `cosine_mse` has none.
    """
    if name == "infonce":
        return infonce(embeddings, rows.counts[0], scale, rows.false_negatives)
    if name in TEACHER_LOSSES:
        return teacher_loss(name, embeddings, rows, scale)
    left, right = embeddings.split(rows.counts, dim=1)
    scores = cast(torch.Tensor, rows.scores)
    if name == "cosine_mse":
        return ((left * right).sum(dim=-1) - scores.to(left.dtype)).square().mean(dim=1)
    similarity = angle_difference(left, right, dims) if name == "angle" else (left * right).sum(dim=-1)
    return _rank_loss(similarity, scores, scale)


def infonce(embeddings: torch.Tensor, anchors: int, scale: float, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """(S,); the first `anchors` rows are the anchors, the others the candidates, positives first."""
    scores = scale * embeddings[:, :anchors] @ embeddings[:, anchors:].transpose(1, 2)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    log_shares = F.log_softmax(scores, dim=-1)
    return -log_shares.diagonal(dim1=1, dim2=2).mean(dim=1)


def angle_difference(left: torch.Tensor, right: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(S, B); real and imaginary parts are the two halves of each size's own dimensions."""
    half = max(dims) // 2
    columns = torch.arange(half, device=left.device)
    halves = _numbers(dims, left)[:, None] // 2
    mask = (columns < halves)[:, None]
    imaginary = (columns + halves).clamp(max=left.shape[-1] - 1)[:, None].expand(-1, left.shape[1], -1)
    a, b = left[..., :half] * mask, left.gather(2, imaginary) * mask
    c, d = right[..., :half] * mask, right.gather(2, imaginary) * mask
    norm_z = (a**2 + b**2).sum(dim=-1, keepdim=True).sqrt()
    norm_w = (c**2 + d**2).sum(dim=-1, keepdim=True).sqrt()
    total = ((a * c + b * d) + (b * c - a * d)) / norm_w**2
    return (total * (norm_w / norm_z)).sum(dim=-1).abs()


def score_kl(students: torch.Tensor, teacher: torch.Tensor, scale: float) -> torch.Tensor:
    """(S,); KL(teacher || student) between the softmaxes over similarities, without each row's similarity with itself.

    Args:
        students: (S, rows, d).
        teacher: (rows, D), or (S, rows, D), one for each student; it is detached.
        scale: the factor of the similarities.
    """
    student, target = (_log_shares(side, scale) for side in (students, teacher.detach()))
    return (target.exp() * (target - student)).sum(dim=(-2, -1)) / students.shape[1]


def query_kl(students: torch.Tensor, teacher: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """(S,); as `score_kl`, between the softmaxes over the similarities of each of the first rows to all other rows.

    Args:
        students: (S, rows, d).
        teacher: (rows, D); it is detached.
        queries: number of the first rows.
        scale: the factor of the similarities.
    """
    student, target = (
        F.log_softmax(scale * side[..., :queries, :] @ side[..., queries:, :].transpose(-1, -2), dim=-1)
        for side in (students, teacher.detach())
    )
    return (target.exp() * (target - student)).sum(dim=(-2, -1)) / queries


def embedding_distance(students: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """(S,); 1 - cosine of each vector to the teacher's, mean over rows.

    Args:
        students: (S, rows, largest dim), unit norm.
        teachers: as `students`; they are detached.
    """
    return 1 - (students * teachers.detach()).sum(dim=-1).mean(dim=-1)


def feature_kl(students: torch.Tensor, teachers: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(S,); KL(teacher || student) between the softmaxes over each size's own dimensions, mean over rows.

    Args:
        students: (S, rows, largest dim).
        teachers: as `students`; they get a gradient, unless the caller has detached them.
        dims: the dim of each size.
    """
    outside = (torch.arange(students.shape[-1], device=students.device) >= _numbers(dims, students)[:, None])[:, None]
    student, teacher = (
        F.log_softmax(side.masked_fill(outside, -torch.inf), dim=-1).masked_fill(outside, 0.0)
        for side in (students, teachers)
    )
    share = teacher.exp().masked_fill(outside, 0.0)
    return (share * (teacher - student)).sum(dim=(-2, -1)) / students.shape[1]


def _log_shares(vectors: torch.Tensor, scale: float) -> torch.Tensor:
    scores = scale * vectors @ vectors.transpose(-1, -2)
    scores.diagonal(dim1=-2, dim2=-1).fill_(ABSENT)  # its share and its gradient become 0
    return F.log_softmax(scores, dim=-1)


def _rank_loss(similarity: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    difference = scale * (similarity[:, None, :] - similarity[:, :, None])  # [., i, j]: sim_j - sim_i
    difference = difference.masked_fill(~(scores[:, None] > scores[None, :]), -torch.inf).flatten(1)
    return torch.logsumexp(F.pad(difference, (1, 0)), dim=1)


def _numbers(dims: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """(S,) on the device of `like`."""
    return to_device(np.asarray(dims), like.device)
