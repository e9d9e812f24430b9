"""MatryoshkaLlavaForConditionalGeneration: LLaVA with nested visual tokens (M3, Cai et al. 2024, arXiv:2405.17430)."""

import os
from typing import cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_m3 import MatryoshkaLlavaConfig
from .costs import PrefillCost, prefill_cost
from .file_modes import share_weights
from .visual_tokens import pool_visual_tokens


class MatryoshkaLlavaModel(LlavaModel):
    """LLaVA without its language-modelling head; `num_visual_tokens` of `forward` is the number of tokens per image.

    A request has two steps, which training runs separately: `encode_images` runs the vision tower once, and
    `pool_images` makes the language model's visual tokens of any level from its output.

    Args:
        config: LLaVA's configuration and the levels.
    """

    config: MatryoshkaLlavaConfig
    config_class = MatryoshkaLlavaConfig

    def __init__(self, config: MatryoshkaLlavaConfig):
        config.check_visual_tokens()
        for part in (config.vision_config, config.text_config):
            if hasattr(part, "auto_map"):
                delattr(part, "auto_map")  # LLaVA's code would ask whether to run what it names
        super().__init__(config)

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The features of each patch, from which every level is pooled.

        Args:
            pixel_values: (images, channels, height, width).
            vision_feature_layer: as in LLaVA; default: the configuration's.
            vision_feature_select_strategy: as in LLaVA; default: the configuration's.
            kwargs: passed to the vision tower.

        Returns:
            (images, patches, width), where width is the language model's with `pool_position` `after_projector`, else
            the vision tower's.

        Raises:
            ValueError: `vision_feature_select_strategy` is unknown.
        """
        config = self.config
        layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy: {strategy!r} is unknown; choose one of default, full")
        layers = [layer] if isinstance(layer, int) else layer
        output = self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": layers, "return_dict": True})
        states = [output.hidden_states[index] for index in layers]
        if strategy == "default":  # without the class token
            states = [state[:, 1:] for state in states]
        features = torch.cat(states, dim=-1)
        return self.multi_modal_projector(features) if config.pool_position == "after_projector" else features

    def pool_images(self, states: torch.Tensor, num_visual_tokens: int | None = None) -> torch.Tensor:
        """The visual tokens (images, num_visual_tokens, hidden) of one level, from the output of `encode_images`."""
        if num_visual_tokens is None:
            num_visual_tokens = self._default_tokens()
        pooled = pool_visual_tokens(states, num_visual_tokens)
        return pooled if self.config.pool_position == "after_projector" else self.multi_modal_projector(pooled)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        num_visual_tokens: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """LLaVA's hook, which `generate` calls too: `pooler_output` is a list of (num_visual_tokens, hidden)."""
        if image_sizes is not None:
            raise ValueError("image_sizes: images of different sizes have no common square grid; leave it out")
        states = self.encode_images(pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs)
        return visual_output(self.pool_images(states, num_visual_tokens))

    def check_placeholders(
        self, input_ids: torch.Tensor, num_images: int, num_visual_tokens: int | None = None
    ) -> None:
        """ValueError if a prompt (batch, length) does not have `num_visual_tokens` placeholders for each image."""
        size = self._default_tokens() if num_visual_tokens is None else num_visual_tokens
        counts = (input_ids == self.config.image_token_id).sum(dim=-1).tolist()
        if num_images == 0 and any(counts):
            raise ValueError(f"pixel_values: none are given for the {sum(counts)} image placeholders in input_ids")
        if num_images and not any(counts):
            raise ValueError(f"input_ids: there is no image placeholder for the {num_images} images in pixel_values")
        if sum(counts) != num_images * size or any(count % size for count in counts):
            raise ValueError(
                f"input_ids: {', '.join(map(str, counts))} image placeholders in the rows do not match {num_images} "
                f"images of num_visual_tokens={size}; let the processor expand them to the same number"
            )

    def _place_images(
        self,
        input_ids: torch.Tensor,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        image_positions: torch.Tensor,
    ) -> torch.Tensor:
        """The embeddings (batch, length, hidden) of the tokens, with visual tokens at the places of placeholders."""
        words = self.get_input_embeddings()(input_ids)
        if not mm_encoder_outputs:
            return words
        images = cast("list[torch.Tensor]", mm_encoder_outputs["image"].pooler_output)
        tokens = torch.cat(images).to(words.device, words.dtype)
        return words.flatten(0, 1).index_copy(0, image_positions.to(words.device), tokens).view_as(words)

    def _default_tokens(self) -> int:
        return cast(int, self.config.default_visual_tokens)  # check_visual_tokens has set it

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_visual_tokens: int | None = None,
        image_positions: torch.LongTensor | None = None,
        **kwargs,
    ):
        """LLaVA's forward pass; see `MatryoshkaLlavaForConditionalGeneration.forward` for what is added."""
        if image_positions is not None and input_ids is not None and pixel_values is None:
            inputs_embeds = self._place_images(input_ids, mm_encoder_outputs, image_positions)
            input_ids = mm_encoder_outputs = None
        start = past_key_values is None or past_key_values.get_seq_length() == 0
        num_images = 0 if pixel_values is None else len(pixel_values)
        if (
            input_ids is not None
            and not torch.compiler.is_compiling()
            and (pixel_values is not None or (start and not mm_encoder_outputs))
        ):
            self.check_placeholders(input_ids, num_images, num_visual_tokens)
        if pixel_values is not None and not mm_encoder_outputs:  # LLaVA itself refuses both at once
            features = self.get_image_features(
                pixel_values, vision_feature_layer, vision_feature_select_strategy, image_sizes, num_visual_tokens
            )
            pixel_values, mm_encoder_outputs = None, {"image": features}
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


class MatryoshkaLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose number of visual tokens is chosen per request (M3, Cai et al. 2024).

    The features of an image's patches are average-pooled on their square grid, so the tokens of every level are means
    of blocks of the next level's tokens. The parameters are those of stock LLaVA: its checkpoints load unchanged, and
    at the full number of tokens the logits are the same.

    Args:
        config: LLaVA's configuration and the levels.
    """

    config: MatryoshkaLlavaConfig
    config_class = MatryoshkaLlavaConfig
    # The loss of a batch is its mean; `Trainer` must not divide it by the tokens of several batches.
    accepts_loss_kwargs = False

    def __init__(self, config: MatryoshkaLlavaConfig):
        # Skips LlavaForConditionalGeneration.__init__, which would build a second model only for it to be replaced.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = MatryoshkaLlavaModel(config)
        text = cast(PreTrainedConfig, config.text_config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_visual_tokens: int | None = None,
        image_positions: torch.LongTensor | None = None,
        **kwargs,
    ):
        """LLaVA's forward pass at one level.

        Args:
            input_ids: (batch, length), text with `num_visual_tokens` placeholders for each image.
            pixel_values: (images, channels, height, width), the images of all rows.
            attention_mask: (batch, length), as in LLaVA, like all arguments that are not described.
            position_ids: (batch, length).
            past_key_values: key-value cache of earlier tokens.
            inputs_embeds: (batch, length, hidden).
            vision_feature_layer: default: the configuration's.
            vision_feature_select_strategy: default: the configuration's.
            labels: (batch, length), -100 for tokens that do not count.
            logits_to_keep: number of last tokens whose logits are computed, 0 for all.
            image_sizes: not supported.
            mm_encoder_outputs: `{"image": visual_output(...)}` from `pool_images`, instead of `pixel_values`.
            num_visual_tokens: tokens per image, the square of a divisor of the grid's side; default:
                `config.default_visual_tokens`.
            image_positions: (visual tokens,), the places of the placeholders in `input_ids`, flattened, for
                `mm_encoder_outputs`. LLaVA finds them itself if they are not given, which waits for a GPU.
            kwargs: passed to LLaVA.

        Raises:
            ValueError: the grid does not allow this number of tokens, or the placeholders do not match the images.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            num_visual_tokens=num_visual_tokens,
            image_positions=image_positions,
            **kwargs,
        )

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """`generate` of transformers, with `num_visual_tokens` as in `forward`; the vision tower runs once."""
        input_ids = kwargs.get("input_ids", inputs)
        images = kwargs.get("pixel_values")
        start = kwargs.get("past_key_values") is None and not kwargs.get("mm_encoder_outputs")
        if input_ids is not None and (start or images is not None):
            # Checked here, because beam search splits the images by counting placeholders before `forward` runs.
            num_images = 0 if images is None else len(images)
            self.model.check_placeholders(input_ids, num_images, kwargs.get("num_visual_tokens"))
        # transformers annotates `self` with a protocol that its own models do not satisfy under mypy.
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """`save_pretrained` of transformers, by default with the parameters' own names.

        With `save_original_format=True`, which is the default of transformers, the older names of LLaVA checkpoints are
        written. They can be loaded too, but not when `Trainer` resumes from a checkpoint: it skips names that it does
        not find.

        Args:
            save_directory: the folder.
            args: those of `PreTrainedModel.save_pretrained`.
            kwargs: those of `PreTrainedModel.save_pretrained`.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            share_weights(save_directory)

    def encode_images(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """See `MatryoshkaLlavaModel.encode_images`."""
        return self.model.encode_images(pixel_values, **kwargs)

    def pool_images(self, states: torch.Tensor, num_visual_tokens: int | None = None) -> torch.Tensor:
        """See `MatryoshkaLlavaModel.pool_images`."""
        return self.model.pool_images(states, num_visual_tokens)

    def prefill_cost(self, num_text_tokens: int, num_visual_tokens: int, num_images: int = 1) -> PrefillCost:
        """What a prompt costs the language model, with keys and values in the precision of the weights."""
        text = cast(PreTrainedConfig, self.config.text_config)
        return prefill_cost(text, num_text_tokens, num_visual_tokens, num_images, self.dtype.itemsize)


def visual_output(tokens: torch.Tensor) -> BaseModelOutputWithPooling:
    """Visual tokens (images, num_visual_tokens, hidden) in the form of `mm_encoder_outputs={"image": ...}`."""
    # LLaVA works with a list, one tensor per image, although the field is declared as a tensor.
    return BaseModelOutputWithPooling(pooler_output=cast(torch.Tensor, list(tokens)))


MatryoshkaLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
# LLaVA checkpoints use older tensor names, which transformers translates only for its own classes.
for ours, theirs in ((MatryoshkaLlavaForConditionalGeneration, "llava"), (MatryoshkaLlavaModel, "LlavaModel")):
    register_checkpoint_conversion_mapping(ours.__name__, get_checkpoint_conversion_mapping(theirs), overwrite=True)

__all__ = ["MatryoshkaLlavaForConditionalGeneration", "MatryoshkaLlavaModel", "visual_output"]
