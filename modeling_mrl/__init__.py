"""Matryoshka Representation Learning for classification: nested heads, cascades, and heads on several exits."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from .cascade import choose_sizes, confidences, fit_thresholds
from .configuration_mrl import MatryoshkaConfig, Size, parse_size
from .head import MatryoshkaHead, nested_loss
from .modeling_mrl import MatryoshkaForImageClassification, MatryoshkaForSequenceClassification
from .outputs import CascadeOutput, MatryoshkaClassifierOutput

AutoConfig.register(MatryoshkaConfig.model_type, MatryoshkaConfig, exist_ok=True)
# Of the two, AutoModel takes the one that a folder's config.json names.
_CLASSES = (MatryoshkaForSequenceClassification, MatryoshkaForImageClassification)
AutoModel.register(MatryoshkaConfig, _CLASSES, exist_ok=True)
AutoModelForSequenceClassification.register(MatryoshkaConfig, MatryoshkaForSequenceClassification, exist_ok=True)
AutoModelForImageClassification.register(MatryoshkaConfig, MatryoshkaForImageClassification, exist_ok=True)

__all__ = [
    "CascadeOutput",
    "MatryoshkaClassifierOutput",
    "MatryoshkaConfig",
    "MatryoshkaForImageClassification",
    "MatryoshkaForSequenceClassification",
    "MatryoshkaHead",
    "Size",
    "choose_sizes",
    "confidences",
    "fit_thresholds",
    "nested_loss",
    "parse_size",
]
