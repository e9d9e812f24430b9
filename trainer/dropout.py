"""Training without dropout, whatever the configuration of the backbone sets."""

import torch


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate of a model to 0, those of the attention too.

    The configuration does not change, so a saved model trains like its backbone. Attention reads its rate from a number
    on the module, which has a different name in each family of transformers, always with "dropout" in it.

    Args:
        model: the model, which is changed in place.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
