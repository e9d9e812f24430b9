"""Training without dropout, whatever a backbone's configuration says."""

import torch


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Let every layer keep all of its values, and of its attention's, in training.

    The configuration is left as it is: a saved model trains on as its backbone would. Attention reads its share from a
    number that each of transformers' families keeps under a name of its own, with "dropout" in it.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
