"""A model of fewer layers that shares the weights of a deeper one, and the names that weights have in a folder."""

from typing import TYPE_CHECKING

import torch

from .configuration_2dmse import TwoDMSEConfig

if TYPE_CHECKING:
    from .modeling_2dmse import TwoDMSEModel

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


def weights_to_save(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict by the names that a folder has, if they are others than the model's own; else None.

    Raises:
        ValueError: accelerate has offloaded weights, and only its hooks know where they are.
    """
    if not hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("device_map: weights of this model are offloaded by accelerate; save it before offloading it")
    if not any(_COMPILED in name for name, _ in model.named_parameters()):
        return None
    return {_name_in_folder(name): tensor for name, tensor in model.state_dict().items()}


def _name_in_folder(name: str) -> str:
    return name.replace(_COMPILED, "")


def cut_model(model: "TwoDMSEModel", config: TwoDMSEConfig) -> "TwoDMSEModel":
    """The model that a configuration of fewer layers describes, with the weights of the given model."""
    with torch.device("meta"):
        small = type(model)(config)
    all_tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = {_name_in_folder(name): tensor for name, tensor in all_tensors}
    absent = next((name for name in small.state_dict() if name not in tensors), None)
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
