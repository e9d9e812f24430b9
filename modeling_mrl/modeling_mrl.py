"""MatryoshkaForSequenceClassification and MatryoshkaForImageClassification: nested classifiers and their cascades."""

import torch
from transformers.utils import can_return_tuple

from .backbone import accepted_inputs, run_layers
from .classifier import MatryoshkaClassifier
from .configuration_mrl import IMAGE_POOLING, TEXT_POOLING
from .early_exit import run_departing
from .outputs import MatryoshkaClassifierOutput
from .pooling import pool


class MatryoshkaForSequenceClassification(MatryoshkaClassifier):
    """
    A classifier of texts at nested sizes (MRL, Kusupati et al. 2022): logits(m) = head_m(pool(state)[:m]).

    With sizes such as `6x64`, heads stand on several exits of the backbone, state(n) being what n layers and the
    backbone's own final norm give, and a cascade saves layers too.
    """

    main_input_name = "input_ids"
    poolings = TEXT_POOLING

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.backbone.set_input_embeddings(value)

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
        """
        Logits of every size.

        Args:
            input_ids: (batch, length); or `inputs_embeds`, (batch, length, width).
            attention_mask: (batch, length), 1 for real tokens; all real when left out.
            labels: (batch,) classes, -100 for rows that do not count.
            size: the size whose logits are `logits`; `config.size` when left out, else the largest.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either input_ids or inputs_embeds")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._classify(self._pooled(inputs), labels, size)

    def _pooled(self, inputs):
        inputs, mask = self._prepare(inputs)
        if self.config.exits:
            stack, norm = self.config.layer_stack, self.config.final_norm
            states = run_layers(self.backbone, stack, norm, self.config.exits, **inputs)
        else:
            states = [self.backbone(**inputs).last_hidden_state]
        return [pool(state, mask, self.config.pooling) for state in states]

    def _walk(self, inputs, walk):
        config = self.config
        if not config.exits:
            return super()._walk(inputs, walk)
        inputs, mask = self._prepare(inputs)

        def visit(n: int, state: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return walk.visit(n, pool(state, mask[rows], config.pooling), rows)

        return run_departing(
            self.backbone, config.layer_stack, config.final_norm, config.exits, visit, walk.batch, **inputs
        )

    def _prepare(self, inputs: dict) -> tuple[dict, torch.Tensor]:
        """What the backbone's forward takes of the inputs, and the mask of real tokens."""
        accepted = accepted_inputs(self.backbone) | {"input_ids", "inputs_embeds"}
        inputs = {name: value for name, value in inputs.items() if name in accepted and value is not None}
        tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return inputs, inputs["attention_mask"]

    @staticmethod
    def _default_pooling(backbone):
        causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
        return "lasttoken" if causal or getattr(backbone.config, "is_decoder", False) else "mean"


class MatryoshkaForImageClassification(MatryoshkaClassifier):
    """A classifier of images at nested sizes (MRL, Kusupati et al. 2022): logits(m) = head_m(pool(state)[:m])."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    poolings = IMAGE_POOLING

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        size: int | str | None = None,
    ) -> MatryoshkaClassifierOutput:
        """
        Logits of every size.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) classes, -100 for rows that do not count.
            size: the size whose logits are `logits`; `config.size` when left out, else the largest.
        """
        return self._classify(self._pooled({"pixel_values": pixel_values}), labels, size)

    def _pooled(self, inputs):
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
    def _default_pooling(backbone):
        has_first_token = any(name.endswith("cls_token") for name, _ in backbone.named_parameters())
        return "cls" if has_first_token else "pooler"

    @classmethod
    def _check_exits_allowed(cls, config):
        if config.exits:
            raise ValueError(f"sizes: {config.sizes[0]} names layers; heads on several exits are for texts alone")


MatryoshkaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MatryoshkaForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "MatryoshkaForImageClassification",
    "MatryoshkaForSequenceClassification",
]
