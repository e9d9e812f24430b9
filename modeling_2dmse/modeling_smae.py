"""StarbucksForMaskedAutoencoding: masked-autoencoder pre-training of every size of an elastic encoder (SMAE)."""

import copy
import os
from collections.abc import Iterable
from typing import Self, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from .backbone import LayerStandIn, build_backbone, cut_config, layers_of, view
from .configuration_2dmse import Size, size_fields
from .configuration_smae import StarbucksConfig
from .file_modes import share_weights
from .import_checks import reads_left_to_right
from .loading import auto_kwargs, check_loaded, tokenizer_kwargs
from .masked_loss import vocabulary_loss
from .mlm_head import MaskedLanguageHead, new_head_settings, read_head
from .modeling_2dmse import TwoDMSEModel
from .outputs import StarbucksOutput

logger = logging.get_logger(__name__)

IGNORED = -100


class FirstTokenReplaced(LayerStandIn):
    """Calls its layer with other states for the first token.

    Args:
        layer: the layer.
        first: (batch, hidden) states of the first token.
    """

    def __init__(self, layer: nn.Module, first: torch.Tensor):
        super().__init__(layer)
        self._first = first

    def forward(self, hidden_states, *args, **kwargs):
        first = self._first.to(hidden_states.dtype).unsqueeze(1)
        return self.layer(torch.cat((first, hidden_states[:, 1:]), dim=1), *args, **kwargs)


class StarbucksForMaskedAutoencoding(PreTrainedModel):
    """SMAE pre-training (Starbucks, Zhuang et al. 2024, section 3.3).

    Every size of the ladder learns to fill in masked words, and to keep in its first token what a weak decoder needs to
    fill in a more heavily masked copy of the text.

    For each size (n, d), x = state(n)[:, :, :d]. MLM: the head, with its first layer cut to d inputs, predicts the
    masked tokens from x. MAE: the head's transform of x's first token replaces the first embedding of the copy, and one
    transformer layer with the head predicts the copy's masked tokens. Logits are computed only at masked positions, and
    the decoder runs all sizes in one batch.

    Args:
        config: the elastic encoder's configuration and the settings of the head.
    """

    config: StarbucksConfig
    decoder_layer: nn.Module

    config_class = StarbucksConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False

    def __init__(self, config: StarbucksConfig):
        super().__init__(config)
        self.encoder = TwoDMSEModel(config.encoder_config)
        first_layer = build_backbone(cut_config(config.encoder_config.backbone_config, 1))
        self.decoder_layer = layers_of(first_layer, self.encoder.config.layer_stack)[0]
        self.head = MaskedLanguageHead(config.hidden_size, **config.head)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike,
        sizes: Iterable[str | Size] | None = None,
        pooling: str | None = None,
        **kwargs,
    ) -> "StarbucksForMaskedAutoencoding":
        """Start from a pre-trained encoder.

        Args:
            name_or_path: a masked-language checkpoint (its head is kept), any other encoder, or a TwoDMSE folder.
            sizes: the ladder, for example `["1x32", "6x384"]`; default: the ladder of a TwoDMSE folder.
            pooling: the pooling that the encoder is saved with, as in `TwoDMSEModel.from_backbone`.
            kwargs: passed to `from_pretrained` (`revision`, `dtype`, `attn_implementation`, ...).

        Returns:
            The model to pre-train, in training mode.

        Raises:
            ValueError: the backbone is a decoder, it does not have one of the sizes, or there is no ladder.
        """
        name_or_path, options = str(name_or_path), auto_kwargs(kwargs)
        elastic = AutoConfig.from_pretrained(name_or_path, **options).model_type == "2dmse"
        if elastic:
            encoder = TwoDMSEModel.from_pretrained(name_or_path, **kwargs)
        else:
            encoder = TwoDMSEModel.from_backbone(name_or_path, pooling=pooling, **kwargs)
        encoder.config.set_ladder(sizes or encoder.config.sizes)
        if encoder.config.sizes is None:
            raise ValueError("sizes: no ladder is set; name the sizes to train, for example 2x64 4x128 6x384")
        if reads_left_to_right(encoder.backbone):
            raise ValueError(
                f"backbone: {type(encoder.backbone).__name__} reads from left to right; SMAE needs an encoder"
            )
        depth = max(size.num_layers for size in encoder.config.ladder)
        if depth < encoder.num_layers:
            logger.warning(f"the ladder ends at {depth} layers; deeper layers would not be trained and are dropped")
            encoder = encoder.truncate(depth)
        found = None if elastic else read_head(name_or_path, options, **{**kwargs, **options})
        settings, weights = found or (new_head_settings(encoder.backbone), None)
        if found is None:
            logger.warning(f"{name_or_path} has no masked-language head; a new one is created on its word embeddings")
        with torch.device("meta"):
            model = cls(StarbucksConfig(encoder_config=encoder.config, head=settings, dtype=encoder.dtype))
        model.encoder = encoder
        model.decoder_layer = copy.deepcopy(layers_of(encoder.backbone, encoder.config.layer_stack)[0])
        model.head = _fill_head(MaskedLanguageHead(encoder.config.hidden_size, **settings), weights, encoder)
        model.config.name_or_path = "" if os.path.isdir(name_or_path) else name_or_path
        return model.train()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a saved pre-training model.

        Args:
            pretrained_model_name_or_path: folder or Hub name of a pre-training model.
            args: those of `PreTrainedModel.from_pretrained`.
            kwargs: those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the weights do not fill the model.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[Self, dict]", loaded)
        model.encoder._hub_kwargs = tokenizer_kwargs(pretrained_model_name_or_path, kwargs)
        check_loaded(
            model, info, pretrained_model_name_or_path, f"{cls.__name__}.from_backbone starts from any encoder"
        )
        return (model, info) if wants_info else model

    @property
    def ladder(self) -> list[Size]:
        """The sizes that are trained, small to large."""
        return self.encoder.config.ladder

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings of the encoder."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the encoder."""
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Not possible here: the masked-language head has a part for each token.

        Raises:
            ValueError: always; it says what to do instead.
        """
        raise ValueError(
            "resize_token_embeddings: resize the encoder or the masked-language model first, save it, and start from "
            "its folder with from_backbone"
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        decoder_labels: torch.Tensor,
        masked: torch.Tensor | None = None,
        decoder_masked: torch.Tensor | None = None,
    ) -> StarbucksOutput:
        """The loss of a batch; the arguments are (batch, length), padded on the right, unless another shape is given.

        Args:
            input_ids: masked text for the encoder.
            attention_mask: 1 for real tokens, 0 for padding; None without padding.
            labels: the encoder's masked tokens, -100 elsewhere.
            decoder_input_ids: the more heavily masked copy of the text.
            decoder_labels: the copy's masked tokens, -100 elsewhere.
            masked: (masked tokens,), the places in `labels`, flattened, that are not -100. Found if not given, which
                waits for a GPU.
            decoder_masked: the same for `decoder_labels`.
        """
        ladder = self.ladder
        layers = sorted({size.num_layers for size in ladder})
        inputs: dict = {"input_ids": input_ids, "attention_mask": attention_mask}
        states = dict(zip(layers, self.encoder.token_states(layers, inputs), strict=True))
        masked = find_masked(labels) if masked is None else masked
        words, first = [], []
        for n, d in ladder:
            state = states[n][..., :d]
            words.append(self.head.transform(state.flatten(0, 1)[masked]))
            first.append(self.head.transform(state[:, 0]))
        mlm = labels.flatten()[masked]
        decoded = self._decode(torch.cat(first), decoder_input_ids, attention_mask, len(ladder))
        masked = find_masked(decoder_labels) if decoder_masked is None else decoder_masked
        mae = decoder_labels.flatten()[masked]
        copies = self.head.transform(decoded.unflatten(0, (len(ladder), -1)).flatten(1, 2)[:, masked].flatten(0, 1))
        return self._loss(torch.cat((*words, copies)), mlm, mae, len(ladder))

    def save_encoder(self, save_directory, **kwargs) -> None:
        """Write the encoder as an ordinary TwoDMSE folder, to fine-tune from it."""
        self.encoder.save_pretrained(save_directory, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save encoder, decoder and head, to continue pre-training."""
        self.config.encoder_config = self.encoder.config
        module = type(self).__module__.rpartition(".")[2]
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**auto_map, "AutoModel": f"{module}.{StarbucksEncoder.__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            share_weights(save_directory)

    def _decode(
        self, first: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None, copies: int
    ) -> torch.Tensor:
        """The decoder's states of the text for each size, (copies * batch, length, hidden), size by size."""
        backbone, stack = self.encoder.backbone, self.encoder.config.layer_stack
        if self.config.head["width"] != self.config.hidden_size:
            first = self._embedding_projection()(first)  # ELECTRA's word embeddings are narrower than its layers
        embeddings = self.get_input_embeddings()(input_ids)
        decoder = view(backbone, stack, [FirstTokenReplaced(self.decoder_layer, first)])
        mask = None if mask is None else mask.repeat(copies, 1)
        return decoder(inputs_embeds=embeddings.repeat(copies, 1, 1), attention_mask=mask).last_hidden_state

    def _embedding_projection(self) -> nn.Linear:
        shape = (self.config.hidden_size, self.config.head["width"])
        for name, module in self.encoder.backbone.named_modules():
            inside = name.startswith(f"{self.encoder.config.layer_stack}.")
            if isinstance(module, nn.Linear) and not inside and tuple(module.weight.shape) == shape:
                return module
        raise ValueError(f"backbone: no layer maps its {shape[1]}-dimensional word embeddings to {shape[0]} dimensions")

    def _loss(self, states: torch.Tensor, mlm: torch.Tensor, mae: torch.Tensor, copies: int) -> StarbucksOutput:
        """The output, from the head's transform of all masked tokens: MLM of every size, then MAE of every size."""
        targets = torch.cat((mlm.repeat(copies), mae.repeat(copies)))
        counts = [copies * len(mlm), copies * len(mae)]
        shares = [states.new_full((count,), 0.5 / max(1, count), dtype=torch.float32) for count in counts]
        weight = self.head.output_weight(self.get_input_embeddings())
        loss, losses, hits = vocabulary_loss(states, weight, self.head.bias, targets, torch.cat(shares))
        parts = [
            part.view(copies, -1).sum(dim=1) * copies / max(1, len(part))
            for values in (losses, hits.to(losses.dtype))
            for part in values.split(counts)
        ]
        return StarbucksOutput(loss, *parts)


class StarbucksEncoder(StarbucksForMaskedAutoencoding):
    """What AutoModel makes of the folder of a pre-training model: its encoder, a `TwoDMSEModel`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """The encoder alone; the arguments are those of `StarbucksForMaskedAutoencoding.from_pretrained`, and the size
        of the encoder, as in `TwoDMSEModel.from_pretrained`."""
        kwargs = size_fields(kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        size = {name: kwargs.pop(name) for name in ("num_layers", "dim") if name in kwargs}
        whole, info = StarbucksForMaskedAutoencoding.from_pretrained(*args, output_loading_info=True, **kwargs)
        encoder = whole.encoder.truncate(**size) if size else whole.encoder
        return (encoder, info) if wants_info else encoder


def find_masked(labels: torch.Tensor) -> torch.Tensor:
    """The places of flattened labels that are not -100."""
    return labels.flatten().ne(IGNORED).nonzero().squeeze(1)


def _fill_head(head: MaskedLanguageHead, weights: dict | None, encoder: TwoDMSEModel) -> MaskedLanguageHead:
    if weights is not None:
        head.load_state_dict(weights)
    else:
        std = getattr(encoder.backbone.config, "initializer_range", 0.02)
        nn.init.normal_(head.dense.weight, std=std)
        nn.init.zeros_(head.dense.bias)
    return head.to(device=encoder.device, dtype=encoder.dtype)


StarbucksForMaskedAutoencoding.register_for_auto_class("AutoModelForPreTraining")

__all__ = ["StarbucksEncoder", "StarbucksForMaskedAutoencoding"]
