"""MatryoshkaForSequenceClassification and MatryoshkaForImageClassification: nested classifiers and their cascades."""

import os
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from .backbone import accepted_inputs, is_decoder, run_layers
from .cascade import CascadeWalk
from .classifier import MatryoshkaClassifier
from .configuration_mrl import IMAGE_POOLING, TEXT_POOLING, MatryoshkaConfig
from .early_exit import run_with_exits
from .outputs import MatryoshkaClassifierOutput
from .pooling import pool


class MatryoshkaForSequenceClassification(MatryoshkaClassifier):
    """A classifier of texts at nested sizes (MRL, Kusupati et al. 2022): logits(m) = head_m(pool(state)[:m]).

    With sizes such as `6x64` there are heads at several exits of the backbone, where state(n) is the output of n layers
    and the backbone's own final norm. A cascade then saves layers as well as dimensions.

    Args:
        config: the backbone's configuration, the sizes and the heads.
    """

    main_input_name = "input_ids"
    poolings = TEXT_POOLING

    def get_input_embeddings(self) -> torch.nn.Module:
        """The word embeddings of the backbone."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the word embeddings of the backbone."""
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> torch.nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; the backbone's configuration has the new size as well."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._note_vocabulary()
        return embeddings

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As `MatryoshkaClassifier.save_pretrained`; word embeddings may have been resized through the backbone."""
        self._note_vocabulary()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _note_vocabulary(self) -> None:
        words = self.get_input_embeddings()
        self.config.vocab_size = getattr(words, "num_embeddings", self.config.vocab_size)
        self.backbone.config.vocab_size = self.config.vocab_size

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        size: int | str | None = None,
    ) -> MatryoshkaClassifierOutput:
        """Logits of every size.

        Args:
            input_ids: (batch, length) token ids, or give `inputs_embeds`.
            attention_mask: (batch, length), 1 for real tokens, 0 for padding; default: no padding.
            token_type_ids: (batch, length), for backbones that have segments.
            position_ids: (batch, length), for backbones that accept them.
            inputs_embeds: (batch, length, width) embeddings instead of `input_ids`.
            labels: (batch,) classes, -100 for rows that do not count.
            size: the size whose logits are `logits`; default: `config.size`, else the largest.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, or there is no head for `size`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either input_ids or inputs_embeds")
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        return self._classify(self._pooled(inputs), labels, size)

    def _pooled(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        options, mask = self._prepare(inputs)
        if self.config.exits:
            stack, norm = self.config.layer_stack, self.config.final_norm
            states = run_layers(self.backbone, stack, norm, self.config.exits, **options)
        else:
            states = [self.backbone(**options).last_hidden_state]
        return [pool(state, mask, self.config.pooling) for state in states]

    def _walk(self, inputs: Mapping[str, torch.Tensor], walk: CascadeWalk) -> torch.Tensor | None:
        config = self.config
        if not config.exits:
            return super()._walk(inputs, walk)
        options, mask = self._prepare(inputs)

        def visit(n: int, state: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return walk.visit(n, pool(state, mask[rows], config.pooling), rows)

        return run_with_exits(
            self.backbone, config.layer_stack, config.final_norm, config.exits, visit, walk.batch, **options
        )

    def _prepare(self, inputs: Mapping[str, torch.Tensor]) -> tuple[dict, torch.Tensor]:
        """The arguments of the backbone's forward, and the mask of real tokens."""
        accepted = accepted_inputs(self.backbone) | {"input_ids", "inputs_embeds"}
        options: dict = {name: value for name, value in inputs.items() if name in accepted}
        tokens = options["input_ids"] if "input_ids" in options else options["inputs_embeds"]
        if "attention_mask" not in options:
            options["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if "use_cache" in accepted:
            options["use_cache"] = False
        return options, options["attention_mask"]

    @staticmethod
    def _default_pooling(backbone: PreTrainedModel) -> str:
        return "lasttoken" if is_decoder(backbone) else "mean"


class MatryoshkaForImageClassification(MatryoshkaClassifier):
    """A classifier of images at nested sizes (MRL, Kusupati et al. 2022): logits(m) = head_m(pool(state)[:m]).

    Args:
        config: the backbone's configuration, the sizes and the heads.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]
    poolings = IMAGE_POOLING

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        size: int | str | None = None,
    ) -> MatryoshkaClassifierOutput:
        """Logits of every size.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) classes, -100 for rows that do not count.
            size: the size whose logits are `logits`; default: `config.size`, else the largest.

        Raises:
            ValueError: there is no head for `size`, or the backbone does not have the state that is pooled.
        """
        return self._classify(self._pooled({"pixel_values": pixel_values}), labels, size)

    def _pooled(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        output = self.backbone(pixel_values=inputs["pixel_values"])
        if self.config.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"pooling: {type(self.backbone).__name__} has no pooler_output; use mean or cls")
            return [pooled.flatten(1).float()]
        state = output.last_hidden_state.float()
        if self.config.pooling == "mean":
            return [state.mean(dim=1) if state.ndim == 3 else state.flatten(2).mean(dim=2)]
        if state.ndim != 3:
            raise ValueError(f"pooling: {type(self.backbone).__name__} has no first token; use mean or pooler")
        return [state[:, 0]]

    @staticmethod
    def _default_pooling(backbone: PreTrainedModel) -> str:
        has_first_token = any(name.endswith("cls_token") for name, _ in backbone.named_parameters())
        return "cls" if has_first_token else "pooler"

    @classmethod
    def _check_exits_allowed(cls, config: MatryoshkaConfig) -> None:
        if config.exits:
            raise ValueError(f"sizes: {config.sizes[0]} names layers; only classifiers of texts have several exits")


MatryoshkaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MatryoshkaForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "MatryoshkaForImageClassification",
    "MatryoshkaForSequenceClassification",
]
