"""A model of fewer layers that shares the weights of a deeper one."""

from typing import TYPE_CHECKING

import torch

from .configuration_2dmse import TwoDMSEConfig

if TYPE_CHECKING:
    from .modeling_2dmse import TwoDMSEModel


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


def cut_model(model: "TwoDMSEModel", config: TwoDMSEConfig) -> "TwoDMSEModel":
    """The model that a configuration of fewer layers describes, with the weights of the given model."""
    with torch.device("meta"):
        small = type(model)(config)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
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
