"""Dropout in training, in place of what a backbone's configuration says."""

import torch


def set_dropout(model: torch.nn.Module, share: float) -> None:
    """Let every layer drop `share` of its values, or of its attention's, in training.

    The configuration is left as it is: a saved model is told nothing of how it was trained. Attention reads its share
    from a number that each of transformers' families keeps under a name of its own, with "dropout" in it.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, share)
