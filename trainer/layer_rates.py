"""A learning rate for each layer: shallow sizes have more to learn than deep ones, and only shallow layers."""

import torch

from modeling_2dmse import TwoDMSEModel

from .arguments import TwoDMSETrainingArguments
from .averaging import initial_shares
from .shared.mixin import TrainerMixin


class LayerRatesMixin(TrainerMixin):
    """Goes before `Trainer`: the optimizer that it makes has the rates of `last_layer_lr_ratio`."""

    args: TwoDMSETrainingArguments
    encoder: TwoDMSEModel

    def create_optimizer(self, model=None):
        """Make the optimizer as `Trainer` does, with a parameter group for each layer if their rates differ."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.last_layer_lr_ratio != 1:
            set_layer_rates(optimizer, self.encoder, self.args.last_layer_lr_ratio)
        return optimizer


def set_layer_rates(optimizer: torch.optim.Optimizer, model: TwoDMSEModel, ratio: float) -> None:
    """Split the parameter groups of an optimizer so that each layer has its own learning rate.

    Layer n of N learns at lr * ratio^((n - 1) / (N - 1)). The embeddings have the rate of the first layer, the
    projection of an exit that of its layer, and the final norm that of the last layer.

    Args:
        optimizer: a new optimizer of the model's parameters, which is changed in place.
        model: the model.
        ratio: the rate of the last layer over that of the first.
    """
    depths = initial_shares(model, 1.0)
    depth = {id(parameter): depths[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for place in sorted({depth[id(parameter)] for parameter in group["params"]}):
            own = [parameter for parameter in group["params"] if depth[id(parameter)] == place]
            groups.append(group | {"params": own, "lr": group["lr"] * ratio**place})
    optimizer.param_groups[:] = groups
