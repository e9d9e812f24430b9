"""Elastic sentence embeddings: one encoder, any number of layers, any number of dimensions."""

from transformers import AutoConfig, AutoModel

from .configuration_2dmse import Size, TwoDMSEConfig, parse_ladder, parse_size
from .modeling_2dmse import TwoDMSEModel, TwoDMSEOutput

AutoConfig.register(TwoDMSEConfig.model_type, TwoDMSEConfig, exist_ok=True)
AutoModel.register(TwoDMSEConfig, TwoDMSEModel, exist_ok=True)

__all__ = ["Size", "TwoDMSEConfig", "TwoDMSEModel", "TwoDMSEOutput", "parse_ladder", "parse_size"]
