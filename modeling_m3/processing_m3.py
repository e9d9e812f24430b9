"""LLaVA's processor with as many image placeholders in the text as an image has visual tokens."""

import copy
import math

from transformers import LlavaProcessor

from .visual_tokens import check_token_count


class MatryoshkaLlavaProcessor(LlavaProcessor):
    """Stock LLaVA's processor, with `num_visual_tokens` placeholders in the text for each image.

    Args:
        image_processor: as in `LlavaProcessor`, like all arguments except for `num_visual_tokens`.
        tokenizer: of the language model.
        patch_size (int | None): of the vision tower, in pixels.
        vision_feature_select_strategy (str | None): `default` (without the class token) or `full`.
        chat_template (str | None): a Jinja template of a conversation.
        image_token (str): the placeholder.
        num_additional_image_tokens (int): class tokens of the vision tower.
        num_visual_tokens (int | None): placeholders per image if a call names no number; default: one for each patch,
            as in stock LLaVA.
        kwargs: those of `LlavaProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_visual_tokens=None,
        **kwargs,
    ):
        self.num_visual_tokens = num_visual_tokens
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )

    def __call__(self, images=None, text=None, num_visual_tokens: int | None = None, **kwargs):
        """Stock LLaVA's call; `num_visual_tokens` must be the number that the model is then called with."""
        if num_visual_tokens is None:
            return super().__call__(images=images, text=text, **kwargs)
        scaled = copy.copy(self)  # a call in another thread keeps its own number
        scaled.num_visual_tokens = num_visual_tokens
        return scaled(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image; ValueError if `num_visual_tokens` does not fit the image."""
        full = super().replace_image_token(image_inputs, image_idx, **kwargs)
        if self.num_visual_tokens is None:
            return full
        patches = len(full) // len(self.image_token)
        check_token_count(self.num_visual_tokens, math.isqrt(patches))
        return self.image_token * self.num_visual_tokens


MatryoshkaLlavaProcessor.register_for_auto_class()

__all__ = ["MatryoshkaLlavaProcessor"]
