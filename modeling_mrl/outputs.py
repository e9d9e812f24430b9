"""What nested classifiers and their cascades return."""

from dataclasses import dataclass
from typing import cast

import torch
from transformers.utils import ModelOutput


@dataclass
class MatryoshkaClassifierOutput(ModelOutput):
    """Output of a nested classifier.

    Args:
        loss: scalar, weighted sum or mean of `losses`; None without labels.
        losses: (sizes,), cross-entropy of each size; None without labels.
        logits: (batch, classes), at the chosen size.
        logits_by_row: (batch, sizes, classes), at every size. The batch comes first, as pipelines and gathering across
            processes expect; `size_logits` has the sizes first.
    """

    loss: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    logits_by_row: torch.Tensor | None = None

    @property
    def size_logits(self) -> torch.Tensor:
        """Logits of every size, (sizes, batch, classes)."""
        return cast(torch.Tensor, self.logits_by_row).transpose(0, 1)


@dataclass
class CascadeOutput(ModelOutput):
    """Output of `predict_cascade`.

    Args:
        labels: (batch,), predicted classes.
        sizes: (batch,), index in `config.ladder` of the size at which each sample stopped.
        confidences: (batch,), the highest probability at that size.
        dims: (batch,), dimensions of that size.
        layers: (batch,), layers that ran for the sample, counted as they ran; None if all heads come after the whole
            backbone.
    """

    labels: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    dims: torch.Tensor | None = None
    layers: torch.Tensor | None = None

    @property
    def expected_dim(self) -> float:
        """Mean of `dims`."""
        return cast(torch.Tensor, self.dims).double().mean().item()

    @property
    def mean_layers(self) -> float | None:
        """Mean of `layers`."""
        return None if self.layers is None else self.layers.double().mean().item()


__all__ = ["CascadeOutput", "MatryoshkaClassifierOutput"]
