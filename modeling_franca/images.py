"""Reading a vision backbone's outputs, and the batches of `encode`."""

import inspect
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, BatchFeature, PreTrainedConfig, PreTrainedModel


def constructor_options(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments of a backbone's class besides its configuration: no pooling head (nothing trains it), a mask token."""
    known = {"add_pooling_layer": False, "use_mask_token": True}
    taken = inspect.signature(cast(type, MODEL_MAPPING[type(config)])).parameters
    return {name: value for name, value in known.items() if name in taken}


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision transformer with random weights."""
    return AutoModel.from_config(config, trust_remote_code=False, **constructor_options(config))


def find_mask_token(backbone: nn.Module) -> nn.Parameter | None:
    """The learned vector that replaces a masked patch; None if the backbone has none."""
    found = [value for name, value in backbone.named_parameters() if name.rpartition(".")[2] == "mask_token"]
    return found[0] if found else None


def count_prefix_tokens(config: PreTrainedConfig) -> int:
    """Number of tokens before the patch tokens: [CLS] and registers."""
    return 1 + getattr(config, "num_register_tokens", 0)


def run_backbone(
    backbone: nn.Module, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
) -> torch.Tensor:
    """(batch, tokens, D) states after the final norm, for images of any size that is a multiple of the patch size."""
    options: dict = {}
    if bool_masked_pos is not None:
        options["bool_masked_pos"] = bool_masked_pos
    if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        options["interpolate_pos_encoding"] = True  # other backbones always do it, or do not need to
    return backbone(pixel_values=pixel_values, **options).last_hidden_state


def check_pixels(name: str, pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> None:
    """ValueError if the height or the width of the images is not a multiple of the patch size."""
    height, width = pixel_values.shape[-2:]
    if height % patch_size[0] or width % patch_size[1] or not height or not width:
        raise ValueError(
            f"{name}: images of {height}x{width} pixels are not allowed; both must be multiples of the patch size "
            f"{patch_size[0]}x{patch_size[1]}"
        )


def batches(images: Sequence | torch.Tensor, size: int, processor) -> Iterator[torch.Tensor]:
    """(up to `size`, channels, height, width) pixel values; a tensor is split as it is."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        if not isinstance(part, torch.Tensor):
            features: BatchFeature = processor(list(part), return_tensors="pt")
            part = features["pixel_values"]
        yield part


__all__ = ["batches", "build_backbone", "check_pixels", "count_prefix_tokens", "find_mask_token", "run_backbone"]
