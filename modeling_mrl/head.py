"""MatryoshkaHead: classifiers on nested prefixes of one vector, and their loss (MRL, Kusupati et al. 2022)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F


class MatryoshkaHead(nn.Module):
    """Classifiers on the first m dimensions of a vector, for each m in `dims`.

    Args:
        dims: nested sizes m, ascending.
        num_labels: number of classes.
        head_type: `separate` (MRL: one Linear(m, classes) per size m) or `tied` (MRL-E: one Linear(max m, classes), of
            which size m uses the first m columns and the whole bias).

    Raises:
        ValueError: `dims` do not ascend from at least 1, or `head_type` is unknown.
    """

    linear: nn.Linear
    linears: nn.ModuleList

    def __init__(self, dims: Sequence[int], num_labels: int, head_type: str = "separate"):
        super().__init__()
        self.dims = list(dims)
        self.head_type = head_type
        if self.dims != sorted(set(self.dims)) or not self.dims or self.dims[0] < 1:
            raise ValueError(f"dims: {self.dims} must ascend from at least 1 and name each size once")
        if head_type == "tied":
            self.linear = nn.Linear(self.dims[-1], num_labels)
        elif head_type == "separate":
            self.linears = nn.ModuleList(nn.Linear(m, num_labels) for m in self.dims)
        else:
            raise ValueError(f"head_type: {head_type!r} is unknown; choose one of separate, tied")

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of all sizes, from (batch, D) to (sizes, batch, classes) in float32; a tied head reads each column
        once."""
        logits: list[torch.Tensor] = []
        previous = 0
        for m in self.dims:
            logits.append(self.widen(states, m, logits[-1] if logits else None, previous))
            previous = m
        return torch.stack(logits)

    def logits(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """Logits of the first `dim` dimensions, from (batch, D) to (batch, classes).

        Raises:
            ValueError: `dim` has no trained prefix: it is above the largest size, or not a size of a `separate` head.
        """
        if not 1 <= dim <= self.dims[-1] or (self.head_type == "separate" and dim not in self.dims):
            raise ValueError(f"dim: {dim} has no trained head; this {self.head_type} head has {self.dims}")
        return self.widen(states, dim)

    def widen(
        self, states: torch.Tensor, dim: int, narrower: torch.Tensor | None = None, previous: int = 0
    ) -> torch.Tensor:
        """Logits of the first `dim` dimensions, given those of the first `previous`.

        A tied head only adds the part of the new columns, logits(m2) = logits(m1) + x[m1:m2] W[:, m1:m2]^T. A cascade
        over all sizes therefore costs no more than the largest size. A separate head starts from the beginning.

        Args:
            states: (batch, D).
            dim: dimensions to read up to.
            narrower: (batch, classes), logits of the first `previous` dimensions; None at the start.
            previous: dimensions that `narrower` has read, 0 at the start.

        Returns:
            (batch, classes) in float32.
        """
        if self.head_type == "separate":
            linear = self._linear_of(dim)
            return linear(states[:, :dim].to(linear.weight.dtype)).float()
        weight = self.linear.weight[:, previous:dim]
        part = F.linear(states[:, previous:dim].to(weight.dtype), weight, None if previous else self.linear.bias)
        return part.float() if narrower is None else narrower + part.float()

    @torch.no_grad()
    def cut(self, dim: int) -> "MatryoshkaHead":
        """A head of only the size `dim`, with a copy of its weights."""
        source = self._linear_of(dim)
        with torch.device("meta"):
            small = MatryoshkaHead([dim], source.out_features, self.head_type)
        target = small._linear_of(dim)
        target.weight = nn.Parameter(source.weight[:, :dim].clone())
        target.bias = nn.Parameter(source.bias.clone())
        return small

    def _linear_of(self, dim: int) -> nn.Linear:
        """The layer that the logits of `dim` dimensions come from."""
        return self.linear if self.head_type == "tied" else cast(nn.Linear, self.linears[self.dims.index(dim)])


def nested_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every size, and their weighted sum (MRL, equation 1).

    Args:
        logits: (sizes, batch, classes).
        labels: (batch,), -100 for rows that do not count.
        weights: c_m of each size; default: 1.
        reduction: `sum`, sum_m c_m loss_m, or `mean`, the same divided by the number of sizes.
        label_smoothing: of the cross-entropy, from 0 to below 1.

    Returns:
        The scalar loss, and the (sizes,) losses before weighting.

    >>> logits = torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]])
    >>> [round(value, 4) for value in nested_loss(logits, torch.tensor([1]), weights=[2, 1])[1].tolist()]
    [0.6931, 0.0]
    """
    losses = torch.stack(
        [F.cross_entropy(size.float(), labels.long(), label_smoothing=label_smoothing) for size in logits]
    )
    weighted = losses if weights is None else losses * losses.new_tensor(weights)
    return (weighted.mean() if reduction == "mean" else weighted.sum()), losses


__all__ = ["MatryoshkaHead", "nested_loss"]
