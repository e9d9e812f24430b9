"""Nested clustering: heads over prefixes, Sinkhorn-Knopp assignments, and the losses on them."""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class NestedClusteringHead(nn.Module):
    """A clustering head for each nesting size (Franca, section 3.1).

    The head of size m maps its m inputs to a unit vector with an MLP. The scores are the cosines between this vector
    and the head's own prototypes. With `head_output` `gelu` they are the products of the MLP's output and the
    normalised prototypes.

    Args:
        hidden_size: dimensions D of an embedding z.
        sizes: the nesting sizes m.
        prototypes: the number of prototypes of each size.
        head_input: `slice`: the inputs are z[:, :m], so this size does not train anything beyond column m;
            `projection`: the inputs are a linear map from all D dimensions to m, as in the released code.
        num_layers: layers of the MLP; one layer is a linear map.
        inner_size: dimensions between the layers of the MLP.
        bottleneck_size: dimensions of the MLP's output.
        head_output: `unit`: the MLP's output is normalised; `gelu`: it passes a GELU and is not normalised, as in the
            released code (a single layer has no GELU).
    """

    def __init__(
        self,
        hidden_size: int,
        sizes: Sequence[int],
        prototypes: Sequence[int],
        head_input: str = "slice",
        num_layers: int = 3,
        inner_size: int = 2048,
        bottleneck_size: int = 256,
        head_output: str = "unit",
    ):
        super().__init__()
        self.sizes = tuple(sizes)
        self.projections = nn.ModuleList()
        if head_input == "projection":
            self.projections.extend(nn.Linear(hidden_size, size) for size in sizes)
        self.normalizes = head_output == "unit"
        ends = not self.normalizes and num_layers > 1
        self.mlps = nn.ModuleList(_mlp(size, num_layers, inner_size, bottleneck_size, ends) for size in sizes)
        self.prototypes = nn.ModuleList(nn.Linear(bottleneck_size, count, bias=False) for count in prototypes)

    def forward(self, embeddings: torch.Tensor) -> list[torch.Tensor]:
        """From (rows, D) embeddings to one (rows, prototypes) tensor of scores per size, in float32."""
        scores = []
        for level, size in enumerate(self.sizes):
            inputs = self.projections[level](embeddings) if self.projections else embeddings[:, :size]
            points = self.mlps[level](inputs).float()
            if self.normalizes:
                points = F.normalize(points, dim=-1)
            with torch.autocast(points.device.type, enabled=False):
                prototypes = cast(nn.Linear, self.prototypes[level]).weight.float()
                scores.append(points @ F.normalize(prototypes, dim=-1).T)
        return scores


def _mlp(inputs: int, num_layers: int, inner: int, outputs: int, ends_in_gelu: bool) -> nn.Sequential:
    widths = [inputs, *[inner] * (num_layers - 1), outputs]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*(layers if ends_in_gelu else layers[:-1]))


@torch.no_grad()
def sinkhorn(
    scores: torch.Tensor, temperature: float, iterations: int = 3, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Sinkhorn-Knopp assignments (SwAV, Caron et al. 2020, section 3.1).

    exp(scores / temperature) is scaled alternately so that all prototypes get the same share of the rows, and so that
    each row sums to 1. The rows are scaled last.

    The computation uses logarithms in float32, and the largest term is subtracted before each sum, so no score is too
    large. If torch.distributed is initialised, prototypes are balanced over the rows of all processes.

    Args:
        scores: (rows, prototypes).
        temperature: the scores are divided by it.
        iterations: how often prototypes and rows are scaled.
        mask: (rows,), False for rows of padding, which have no influence and are 0 in the result.

    Returns:
        (rows, prototypes) in float32, without gradient.

    >>> sinkhorn(torch.tensor([[9.0, 8.0], [9.0, 9.0]]), temperature=1.0, iterations=50).round(decimals=2)
    tensor([[0.6200, 0.3800],
            [0.3800, 0.6200]])
    """
    logits = scores.float() / temperature
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
    for _ in range(iterations):
        logits = logits - _log_sum_of_rows(logits)
        logits = logits - logits.logsumexp(dim=1, keepdim=True)
        if mask is not None:  # a row of padding is -inf minus -inf
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
    return logits.exp()


def _log_sum_of_rows(logits: torch.Tensor) -> torch.Tensor:
    """log of the sum over the rows of all processes, (prototypes,)."""
    lowest = torch.finfo(logits.dtype).min  # a process may have no rows
    largest = torch.cat((logits, logits.new_full((1, logits.shape[1]), lowest))).amax(dim=0)
    if _is_distributed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = (logits - largest).exp().sum(dim=0)
    if _is_distributed():
        dist.all_reduce(total)
    return largest + total.log()


def assignment_loss(assignments: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of the student's softmax(scores / temperature) under the teacher's assignments.

    Args:
        assignments: (..., prototypes).
        scores: (..., prototypes).
        temperature: the scores are divided by it.

    Returns:
        (...), not averaged over rows.
    """
    return -(assignments * F.log_softmax(scores.float() / temperature, dim=-1)).sum(dim=-1)


def pairwise_assignment_loss(assignments: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """`assignment_loss` of each of the teacher's views with each of the student's, without a tensor of all pairs.

    Args:
        assignments: (batch, G, prototypes).
        scores: (batch, S, prototypes).
        temperature: the scores are divided by it.

    Returns:
        (batch, G, S).
    """
    with torch.autocast(scores.device.type, enabled=False):
        return -(assignments @ F.log_softmax(scores.float() / temperature, dim=-1).transpose(1, 2))


def koleo_loss(embeddings: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """The KoLeo regulariser (Sablayrolles et al. 2019, equation 2), which spreads unit vectors out.

    It is minus the mean log distance of each vector to its nearest neighbour. Neighbours are searched among the rows of
    all processes; the value, and the mean of the gradients over processes, are those of one process with all rows.

    Args:
        embeddings: (rows, D), not yet normalised; the same number of rows in each process.
        eps: added to the distance before the logarithm.

    Raises:
        ValueError: there is only one row, which has no neighbour.
    """
    points = _gather(F.normalize(embeddings.float(), dim=-1))
    if len(points) < 2:
        raise ValueError("koleo_weight: a batch of 1 has no nearest neighbour; use a larger batch, or koleo_weight 0")
    with torch.no_grad():
        similarity = points @ points.T
        nearest = similarity.fill_diagonal_(-2.0).argmax(dim=1)
    return -(F.pairwise_distance(points, points[nearest], eps=eps) + eps).log().mean()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes.

    Gradients reach only a process's own rows, multiplied by the number of processes, so that their mean over processes
    is the sum.
    """
    if not _is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    own = rows.view_as(rows)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * dist.get_world_size())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


__all__ = ["NestedClusteringHead", "assignment_loss", "koleo_loss", "pairwise_assignment_loss", "sinkhorn"]
