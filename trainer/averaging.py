"""Averaging the trained weights with those from before training, more in upper layers than in lower ones.

The average of a fine-tuned model and its start keeps more of what the start could do than either a smaller learning
rate or fewer steps (Wortsman et al. 2022, Robust fine-tuning of zero-shot models, section 4). In an elastic model, the
start could do the largest size alone: lower layers, which shallow sizes end in, have to move far, upper ones do not.
"""

from collections.abc import Mapping

import torch

from modeling_2dmse import TwoDMSEModel


def initial_shares(model: TwoDMSEModel, last: float) -> dict[str, float]:
    """The share of the initial weights, by parameter: rising evenly from 0 in the first layer to `last` in the last.

    An exit's projection has its layer's share, embeddings have 0, the final norm behind the last layer has `last`. A
    model of one layer has 0 throughout.
    """
    stack = f"backbone.{model.config.layer_stack}."
    norm, step = f"backbone.{model.config.final_norm}.", last / max(1, model.num_layers - 1)
    shares = {}
    for name, _ in model.named_parameters():
        for prefix in (stack, "exit_projections."):
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
        initial: the parameters by name, as they were before training.
        last: share of the initial weights in the last layer, 0 to 1.
    """
    shares = initial_shares(model, last)
    for name, parameter in model.named_parameters():
        if shares[name]:
            parameter.lerp_(initial[name].to(parameter.device, parameter.dtype), shares[name])
