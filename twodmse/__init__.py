"""The public names of the project in one place: `from twodmse import TwoDMSEModel, TwoDMSETrainer, ...`.

A name's module is imported when the name is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling_2dmse import (
        Size,
        StarbucksConfig,
        StarbucksForMaskedAutoencoding,
        TwoDMSEConfig,
        TwoDMSEModel,
        parse_ladder,
        parse_size,
    )
    from modeling_franca import FrancaConfig, FrancaForPretraining, FrancaModel, RasaProjector, grid_positions
    from modeling_m3 import (
        MatryoshkaLlavaConfig,
        MatryoshkaLlavaForConditionalGeneration,
        MatryoshkaLlavaProcessor,
    )
    from modeling_mrl import (
        MatryoshkaConfig,
        MatryoshkaForImageClassification,
        MatryoshkaForSequenceClassification,
        fit_thresholds,
    )
    from retrieval import FunnelIndex, Stage, parse_stages
    from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, fit_exit_gates, fit_exit_projections
    from trainer.franca.trainer import FrancaTrainer, FrancaTrainingArguments
    from trainer.m3.trainer import M3Trainer, M3TrainingArguments
    from trainer.metrics import EmbeddingSimilarity
    from trainer.mrl.trainer import ClassifierTrainer, ClassifierTrainingArguments
    from trainer.smae.arguments import SmaeTrainingArguments
    from trainer.smae.trainer import SmaeTrainer

__version__ = "0.1.0"

_NAMES = {
    "modeling_2dmse": (
        "Size",
        "StarbucksConfig",
        "StarbucksForMaskedAutoencoding",
        "TwoDMSEConfig",
        "TwoDMSEModel",
        "parse_ladder",
        "parse_size",
    ),
    "modeling_franca": ("FrancaConfig", "FrancaForPretraining", "FrancaModel", "RasaProjector", "grid_positions"),
    "modeling_m3": (
        "MatryoshkaLlavaConfig",
        "MatryoshkaLlavaForConditionalGeneration",
        "MatryoshkaLlavaProcessor",
    ),
    "modeling_mrl": (
        "MatryoshkaConfig",
        "MatryoshkaForImageClassification",
        "MatryoshkaForSequenceClassification",
        "fit_thresholds",
    ),
    "retrieval": ("FunnelIndex", "Stage", "parse_stages"),
    "trainer": ("TwoDMSETrainer", "TwoDMSETrainingArguments", "fit_exit_gates", "fit_exit_projections"),
    "trainer.franca.trainer": ("FrancaTrainer", "FrancaTrainingArguments"),
    "trainer.m3.trainer": ("M3Trainer", "M3TrainingArguments"),
    "trainer.metrics": ("EmbeddingSimilarity",),
    "trainer.mrl.trainer": ("ClassifierTrainer", "ClassifierTrainingArguments"),
    "trainer.smae.arguments": ("SmaeTrainingArguments",),
    "trainer.smae.trainer": ("SmaeTrainer",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
