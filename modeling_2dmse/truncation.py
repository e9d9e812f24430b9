"""A model of fewer layers that shares the weights of a deeper one, and the names that weights have in a folder."""

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .configuration_2dmse import TwoDMSEConfig

if TYPE_CHECKING:
    from .modeling_2dmse import TwoDMSEModel

logger = logging.get_logger(__name__)

# What torch.compile adds to the names of the weights of a part that it wraps.
_COMPILED = "_orig_mod."


def check_whole(model: torch.nn.Module) -> None:
    """ValueError unless all weights are at hand, on one device and without adapters."""
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("adapters: this model has PEFT adapters; merge them first with merge_and_unload()")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"device_map: the weights of this model are on {' and '.join(devices)} (meta: offloaded); load it without "
            "device_map, or with num_layers and dim, to cut it"
        )


def weights_to_save(model: "TwoDMSEModel") -> dict[str, torch.Tensor] | None:
    """The state dict by the names that a folder has, if they are others than the model's own; else None.

    A part that is wrapped in a module of one's own gives a warning.

    Raises:
        ValueError: accelerate has offloaded weights, and only its hooks know where they are.
    """
    if not hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("device_map: weights of this model are offloaded by accelerate; save it before offloading it")
    _warn_of_wrapped(model)
    if not any(_COMPILED in name for name, _ in model.named_parameters()):
        return None
    return {_name_in_folder(name): tensor for name, tensor in model.state_dict().items()}


def _warn_of_wrapped(model: "TwoDMSEModel") -> None:
    """Warn of a part that is wrapped in a module of one's own: the names of its weights are not those of the class."""
    wanted = _empty_model(model, copy.deepcopy(model.config))
    absent = _first_absent(wanted, {_name_in_folder(name) for name in model.state_dict()})
    if absent is not None:
        logger.warning(
            f"backbone: this model has no {absent}; a part of it is wrapped, and from_pretrained will refuse what is "
            "saved now; unwrap it and save again"
        )


def warn_of_base_size(model: "TwoDMSEModel") -> None:
    """Warn if the folder of adapters that is saved will be read at another size, that of the base model it names."""
    name, config = str(model.config.name_or_path), model.config
    try:
        stored, _ = TwoDMSEConfig.get_config_dict(name, local_files_only=True)
    except (OSError, ValueError):  # it is not at hand
        return
    if stored.get("model_type") != TwoDMSEConfig.model_type:
        return
    base = TwoDMSEConfig.from_dict(stored)
    if (base.num_layers, base.dim) != (config.num_layers, config.dim):
        logger.warning(
            f"adapters: their folder does not keep the size, and {name} has {base.num_layers}x{base.dim}; load it with "
            f"num_layers={config.num_layers} and dim={config.dim}"
        )


def _name_in_folder(name: str) -> str:
    return name.replace(_COMPILED, "")


def cut_model(model: "TwoDMSEModel", config: TwoDMSEConfig) -> "TwoDMSEModel":
    """The model that a configuration of fewer layers describes, with the weights of the given model."""
    small = _empty_model(model, config)
    all_tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = {_name_in_folder(name): tensor for name, tensor in all_tensors}
    absent = _first_absent(small, tensors.keys())
    if absent is not None:
        raise ValueError(f"backbone: this model has no {absent}; a part of it is wrapped, unwrap it to cut the model")
    for name, module in small.named_modules():
        for key in module._parameters:
            if module._parameters[key] is not None:
                source = tensors[f"{name}.{key}"]
                module._parameters[key] = torch.nn.Parameter(source.detach(), requires_grad=source.requires_grad)
        for key in module._buffers:
            if module._buffers[key] is not None:
                module._buffers[key] = tensors[f"{name}.{key}"]
    small.tie_weights()
    return small


def _empty_model(model: "TwoDMSEModel", config: TwoDMSEConfig) -> "TwoDMSEModel":
    with torch.device("meta"):
        return type(model)(config)


def _first_absent(wanted: "TwoDMSEModel", names: Collection[str]) -> str | None:
    """The first name in the state dict of a model that is not among the given ones."""
    return next((name for name in wanted.state_dict() if name not in names), None)
