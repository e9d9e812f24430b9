"""M3: one LLaVA with a number of visual tokens that is chosen per request."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_m3 import MatryoshkaLlavaConfig
from .costs import PrefillCost, prefill_cost
from .modeling_m3 import MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaModel, visual_output
from .processing_m3 import MatryoshkaLlavaProcessor
from .visual_tokens import pool_visual_tokens

AutoConfig.register(MatryoshkaLlavaConfig.model_type, MatryoshkaLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(MatryoshkaLlavaConfig, MatryoshkaLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MatryoshkaLlavaConfig, MatryoshkaLlavaProcessor, exist_ok=True)

__all__ = [
    "MatryoshkaLlavaConfig",
    "MatryoshkaLlavaForConditionalGeneration",
    "MatryoshkaLlavaModel",
    "MatryoshkaLlavaProcessor",
    "PrefillCost",
    "pool_visual_tokens",
    "prefill_cost",
    "visual_output",
]
