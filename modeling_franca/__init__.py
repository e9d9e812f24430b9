"""Franca: nested Matryoshka clustering of images, and the removal of position from dense features."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .clustering import NestedClusteringHead, assignment_loss, koleo_loss, sinkhorn
from .configuration_franca import FrancaConfig
from .cyclic_mask import CyclicMask
from .modeling_franca import FrancaModel, FrancaModelOutput
from .modeling_franca_pretraining import FrancaForPretraining, FrancaPretrainingOutput
from .rasa import RasaProjector, grid_positions

AutoConfig.register(FrancaConfig.model_type, FrancaConfig, exist_ok=True)
AutoModel.register(FrancaConfig, FrancaModel, exist_ok=True)
AutoModelForPreTraining.register(FrancaConfig, FrancaForPretraining, exist_ok=True)

__all__ = [
    "CyclicMask",
    "FrancaConfig",
    "FrancaForPretraining",
    "FrancaModel",
    "FrancaModelOutput",
    "FrancaPretrainingOutput",
    "NestedClusteringHead",
    "RasaProjector",
    "assignment_loss",
    "grid_positions",
    "koleo_loss",
    "sinkhorn",
]
