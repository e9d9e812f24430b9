"""Elastic sentence embeddings: one encoder, any number of layers, any number of dimensions."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .configuration_2dmse import Size, TwoDMSEConfig, parse_ladder, parse_size
from .configuration_smae import StarbucksConfig
from .modeling_2dmse import TwoDMSEModel
from .modeling_smae import StarbucksEncoder, StarbucksForMaskedAutoencoding
from .outputs import StarbucksOutput, TwoDMSEOutput

AutoConfig.register(TwoDMSEConfig.model_type, TwoDMSEConfig, exist_ok=True)
AutoModel.register(TwoDMSEConfig, TwoDMSEModel, exist_ok=True)
AutoConfig.register(StarbucksConfig.model_type, StarbucksConfig, exist_ok=True)
AutoModel.register(StarbucksConfig, StarbucksEncoder, exist_ok=True)
AutoModelForPreTraining.register(StarbucksConfig, StarbucksForMaskedAutoencoding, exist_ok=True)

__all__ = [
    "Size",
    "StarbucksConfig",
    "StarbucksForMaskedAutoencoding",
    "StarbucksOutput",
    "TwoDMSEConfig",
    "TwoDMSEModel",
    "TwoDMSEOutput",
    "parse_ladder",
    "parse_size",
]
