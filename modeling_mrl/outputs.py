"""What nested classifiers and their cascades return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class MatryoshkaClassifierOutput(ModelOutput):
    """
    Output of a nested classifier.

    Args:
        loss (`torch.Tensor`, scalar): weighted sum or mean of `losses`; None without labels.
        losses (`torch.Tensor`, (sizes,)): cross-entropy of each size; None without labels.
        logits (`torch.Tensor`, (batch, classes)): at the chosen size.
        logits_by_row (`torch.Tensor`, (batch, sizes, classes)): of every size, batch first, as pipelines and gathering
            across processes want it; `size_logits` is the same by size.
    """

    loss: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    logits_by_row: torch.Tensor | None = None

    @property
    def size_logits(self) -> torch.Tensor:
        """Logits of every size, (sizes, batch, classes)."""
        return self.logits_by_row.transpose(0, 1)


@dataclass
class CascadeOutput(ModelOutput):
    """
    Output of `predict_cascade`.

    Args:
        labels (`torch.Tensor`, (batch,)): predicted classes.
        sizes (`torch.Tensor`, (batch,)): index in `config.ladder` of the size that each sample stopped at.
        confidences (`torch.Tensor`, (batch,)): its highest probability there.
        dims (`torch.Tensor`, (batch,)): dimensions of that size.
        layers (`torch.Tensor`, (batch,)): layers that ran for the sample, counted as they ran; None where heads stand
            behind the whole backbone alone.
    """

    labels: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    dims: torch.Tensor | None = None
    layers: torch.Tensor | None = None

    @property
    def expected_dim(self) -> float:
        """Mean of `dims`."""
        return self.dims.double().mean().item()

    @property
    def mean_layers(self) -> float | None:
        """Mean of `layers`."""
        return None if self.layers is None else self.layers.double().mean().item()


__all__ = ["CascadeOutput", "MatryoshkaClassifierOutput"]
