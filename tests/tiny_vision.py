"""Tiny random vision transformers, and small generated images."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BitImageProcessorPil,
    Dinov2Config,
    DINOv3ViTConfig,
    ViTConfig,
)

from modeling_franca import FrancaConfig, FrancaForPretraining

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
FAMILIES = {
    "dinov2": lambda: Dinov2Config(**SHAPE, mlp_ratio=2),
    "vit": lambda: ViTConfig(**SHAPE, intermediate_size=24),
    "dinov3_vit": lambda: DINOv3ViTConfig(**SHAPE, intermediate_size=24, num_register_tokens=2),
}
SETTINGS = {"nesting_sizes": [4, 8, 16], "num_prototypes": 24, "head_hidden_size": 12, "head_bottleneck_size": 8}


def tiny_config(family: str = "dinov2", **settings) -> FrancaConfig:
    return FrancaConfig(FAMILIES[family](), **{**SETTINGS, **settings})


def tiny_processor(size: int = 16) -> BaseImageProcessor:
    """A processor as a saved model loads it: with torchvision, if installed, whose pixels differ slightly."""
    with tempfile.TemporaryDirectory() as folder:
        shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        BitImageProcessorPil(**shape).save_pretrained(folder)
        return AutoImageProcessor.from_pretrained(folder)


def tiny_model(family: str = "dinov2", seed: int = 0, **settings) -> FrancaForPretraining:
    """A model whose student and teacher differ."""
    torch.manual_seed(seed)
    model = FrancaForPretraining(tiny_config(family, **settings)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.image_processor = tiny_processor()
    return model


def tiny_batch(pictures: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((pictures, 2, 16), generator=generator) < 0.4
    mask[0, 1] = False  # a crop without a mask
    return {
        "global_crops": torch.randn((pictures, 2, 3, 16, 16), generator=generator),
        "local_crops": torch.randn((pictures, 3, 3, 8, 8), generator=generator),
        "mask": mask,
    }


def draw_picture(label: int, index: int, size: int = 20) -> Image.Image:
    """Noise around a color that depends on the label."""
    rng = np.random.default_rng([label, index])
    color = np.array([(200, 60, 60), (60, 60, 200)][label])
    return Image.fromarray((color + rng.integers(-50, 50, (size, size, 3))).astype(np.uint8))


def write_pictures(folder: Path, pictures: int) -> Path:
    """Write one folder per class, with `pictures` images each."""
    for label, name in enumerate(("blue", "red")):
        (folder / name).mkdir(parents=True)
        for index in range(pictures):
            draw_picture(label, index).save(folder / name / f"{index}.png")
    return folder
