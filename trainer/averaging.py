"""Averaging the trained weights with the initial weights, more in upper layers than in lower ones.

This is weight-space ensembling (WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 4):
the average of a fine-tuned model and its initial weights keeps more of the initial model's abilities than a smaller
learning rate or fewer steps do. In an elastic model, the initial weights are good at the largest size only. The lower
layers, where the shallow sizes end, have to change a lot; the upper layers do not. So each layer has its own share.
"""

from collections.abc import Mapping

import torch

from modeling_2dmse import TwoDMSEModel


def initial_shares(model: TwoDMSEModel, last: float, by_layer: str = "linear") -> dict[str, float]:
    """The share of the initial weights in the average of each parameter.

    The projection and the gate of an exit have the share of its layer, the embeddings have 0, and the final norm after
    the last layer has that of the last layer.

    Args:
        model: the model.
        last: the share in the last layer, from 0 to 1.
        by_layer: `linear`: it rises linearly from 0 in the first layer to `last`, and is 0 in a model of one layer.
            `step`: it is 0 up to the last layer of the ladder's smallest size and `last` above it. If all sizes have
            all layers, it is `last` in each of them.

    Returns:
        the share of each parameter, by name.
    """
    count = model.num_layers
    if by_layer == "step":
        smallest = min(model.config.ladder).num_layers
        kept = smallest if smallest < count else 0  # without shallow sizes no layer has to change a lot
        by_index = [0.0 if index < kept else last for index in range(count)]
    else:
        by_index = [last * index / max(1, count - 1) for index in range(count)]
    stack, norm = f"backbone.{model.config.layer_stack}.", f"backbone.{model.config.final_norm}."
    shares = {}
    for name, _ in model.named_parameters():
        for prefix in (stack, "exit_projections.", "exit_gates."):
            if name.startswith(prefix):
                shares[name] = by_index[int(name.removeprefix(prefix).split(".")[0])]
                break
        else:
            is_norm = bool(model.config.final_norm) and name.startswith(norm)
            shares[name] = by_index[-1] if is_norm else 0.0
    return shares


@torch.no_grad()
def average_with_initial(
    model: TwoDMSEModel, initial: Mapping[str, torch.Tensor], last: float, by_layer: str = "linear"
) -> None:
    """Set each parameter to share * initial + (1 - share) * trained, with the shares of `initial_shares`.

    Args:
        model: the trained model, which is changed in place.
        initial: the parameters before training, by name.
        last: the share of the initial weights in the last layer, from 0 to 1.
        by_layer: `linear` or `step`, see `initial_shares`.
    """
    shares = initial_shares(model, last, by_layer)
    for name, parameter in model.named_parameters():
        if shares[name]:
            parameter.lerp_(initial[name].to(parameter.device, parameter.dtype), shares[name])
