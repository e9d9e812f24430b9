"""What the elastic encoder and its SMAE pre-training return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class TwoDMSEOutput(ModelOutput):
    """Output of `TwoDMSEModel`.

    Args:
        last_hidden_state: (batch, length, config.dim), token states of the deepest exit, after the backbone's final
            norm, times their weights if the exit has a gate (see `pooling.token_weights`), projected and cut. None if
            `layers` was given: only pooled states are projected then.
        layer_embeddings: (len(layers), batch, hidden) in float32, pooled states of the exits in `layers`, neither cut
            nor normalised. None if `layers` was not given.
    """

    last_hidden_state: torch.Tensor | None = None
    layer_embeddings: torch.Tensor | None = None


@dataclass
class StarbucksOutput(ModelOutput):
    """Output of `StarbucksForMaskedAutoencoding`. All fields except `loss` are without gradient, one entry per size.

    Args:
        loss: scalar, the mean over sizes of (loss_mlm + loss_mae) / 2.
        loss_mlm: (sizes,), mean cross-entropy of the encoder's masked tokens.
        loss_mae: (sizes,), mean cross-entropy of the decoder's masked tokens.
        accuracy_mlm: (sizes,), share of the encoder's masked tokens that are predicted correctly.
        accuracy_mae: (sizes,), share of the decoder's masked tokens that are predicted correctly.
    """

    loss: torch.Tensor | None = None
    loss_mlm: torch.Tensor | None = None
    loss_mae: torch.Tensor | None = None
    accuracy_mlm: torch.Tensor | None = None
    accuracy_mae: torch.Tensor | None = None


__all__ = ["StarbucksOutput", "TwoDMSEOutput"]
