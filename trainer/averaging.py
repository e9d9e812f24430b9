"""Averaging the trained weights with the initial weights, more in upper layers than in lower ones.

This is weight-space ensembling (WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 4):
the average of a fine-tuned model and its initial weights keeps more of the initial model's abilities than a smaller
learning rate or fewer steps do. In an elastic model, the initial weights are good at the largest size only. The lower
layers, where the shallow sizes end, have to change a lot; the upper layers do not. So each layer has its own share.
"""

from collections.abc import Mapping

import torch

from modeling_2dmse import TwoDMSEModel


def initial_shares(model: TwoDMSEModel, last: float) -> dict[str, float]:
    """The share of the initial weights in the average of each parameter.

    It rises linearly from 0 in the first layer to `last` in the last layer. The projection and the gate of an exit have
    the share of its layer, the embeddings have 0, and the final norm after the last layer has `last`. In a model of one
    layer, every share is 0.

    Args:
        model: the model.
        last: the share in the last layer, from 0 to 1.

    Returns:
        the share of each parameter, by name.
    """
    stack = f"backbone.{model.config.layer_stack}."
    norm, step = f"backbone.{model.config.final_norm}.", last / max(1, model.num_layers - 1)
    shares = {}
    for name, _ in model.named_parameters():
        for prefix in (stack, "exit_projections.", "exit_gates."):
            if name.startswith(prefix):
                shares[name] = step * int(name.removeprefix(prefix).split(".")[0])
                break
        else:
            is_norm = bool(model.config.final_norm) and name.startswith(norm)
            shares[name] = step * (model.num_layers - 1) if is_norm else 0.0
    return shares


@torch.no_grad()
def average_with_initial(model: TwoDMSEModel, initial: Mapping[str, torch.Tensor], last: float) -> None:
    """Set each parameter to share * initial + (1 - share) * trained, with the shares of `initial_shares`.

    Args:
        model: the trained model, which is changed in place.
        initial: the parameters before training, by name.
        last: the share of the initial weights in the last layer, from 0 to 1.
    """
    shares = initial_shares(model, last)
    for name, parameter in model.named_parameters():
        if shares[name]:
            parameter.lerp_(initial[name].to(parameter.device, parameter.dtype), shares[name])
