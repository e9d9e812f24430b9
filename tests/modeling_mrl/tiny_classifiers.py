"""Tiny nested classifiers of texts and images, and a batch whose rows differ."""

import torch
import transformers
from conftest import HIDDEN

from modeling_mrl import MatryoshkaForImageClassification, MatryoshkaForSequenceClassification

EXITS = ["1x8", "1x16", "2x4", "2x32", "4x32"]
IMAGE_CONFIGS = {
    "vit": lambda: transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    ),
    "dinov2": lambda: transformers.Dinov2Config(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    ),
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, HIDDEN], depths=[1, 1], layer_type="basic"
    ),
    "convnext": lambda: transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, HIDDEN], depths=[1, 1]),
}


def text_classifier(folder, **kwargs) -> MatryoshkaForSequenceClassification:
    """A nested classifier of three classes on the backbone in a folder."""
    torch.manual_seed(0)
    return _spread(MatryoshkaForSequenceClassification.from_backbone(folder, **{**_SETTINGS, **kwargs}))


def image_classifier(family: str, folder, **kwargs) -> MatryoshkaForImageClassification:
    """A nested classifier of three classes on a random backbone of a family; the backbone is written to a folder."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(IMAGE_CONFIGS[family]()).save_pretrained(folder)
    return _spread(MatryoshkaForImageClassification.from_backbone(folder, **{**_SETTINGS, **kwargs}))


_SETTINGS = {"sizes": [4, 8, 32], "num_labels": 3}


def _spread(model):
    # Far enough from the initial values that sizes and classes differ.
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def token_batch() -> dict[str, torch.Tensor]:
    """Four rows of four tokens; there are also four attention heads and four layers, so no axis can be told by size."""
    ids = torch.randint(4, 160, (4, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 2:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one_leaves_at_each(confidence: torch.Tensor) -> list[float]:
    """Thresholds from confidences (sizes, samples): at each size the most confident remaining sample leaves, and the
    last sample leaves at the largest size."""
    left, thresholds = list(range(confidence.shape[1])), []
    for levels in confidence[:-1].tolist():
        order = sorted(left, key=levels.__getitem__)
        thresholds.append(sum(levels[row] for row in order[-2:]) / 2 if len(order) > 1 else 1.1)
        left = order[:-1] if len(order) > 1 else order
    return thresholds
