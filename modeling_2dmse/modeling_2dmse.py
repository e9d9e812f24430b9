"""TwoDMSEModel: a text encoder with an embedding at any number of layers and any number of dimensions."""

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Self, cast

import torch
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple, logging

from .backbone import (
    accepted_inputs,
    build_backbone,
    check_final_norm,
    check_layer_stack,
    cut_config,
    run_layers,
    supports_inputs_embeds,
    without_cache,
)
from .batching import back_in_order, row_lengths, tight_groups
from .configuration_2dmse import Size, TwoDMSEConfig
from .encoding import EncodeMixin, check_between
from .exits import ExitsMixin
from .export import check_export, export
from .file_modes import share_weights
from .importing import import_backbone
from .loading import check_loaded, check_type, hub_kwargs, tokenizer_kwargs
from .outputs import TwoDMSEOutput
from .packing import Packing, packed_inputs
from .projection import ExitGate, ExitProjection
from .sentence_transformers_files import write_sentence_transformers_files
from .sentence_transformers_import import cuts_later
from .synonyms import SynonymsMixin, sized
from .tokens import finish_tokenizer
from .truncation import check_whole, cut_model, warn_of_base_size, weights_to_save

logger = logging.get_logger(__name__)


class TwoDMSEModel(SynonymsMixin, EncodeMixin, ExitsMixin, PreTrainedModel):
    """An elastic encoder around any text backbone of transformers (2DMSE, Li et al. 2024; Starbucks, Zhuang et al.).

    embedding(n, d) = normalize((pool(state(n), attention_mask) W_n)[:d]), where state(n) is the output of n layers and
    the backbone's own final norm, and W_n is the exit's projection. With gates, `pool` weighs the tokens of exit n by
    softmax(state(n) v_n) too. Projections and gates are absent unless the model has them; `normalize` is left out if
    `config.similarity` is `dot`. A model cut to n layers and saved gives exactly the same embeddings.

    Args:
        config: the backbone's configuration, pooling, sizes and prompts.

    Raises:
        ValueError: `config` asks for more layers or dimensions than the backbone has, or the layers of the backbone
            cannot be found.
    """

    config_class = TwoDMSEConfig
    base_model_prefix = "twodmse"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The trainer computes the loss, which is not divided by a number of items.
    accepts_loss_kwargs = False

    def __init__(self, config: TwoDMSEConfig):
        super().__init__(config)
        stored = config.backbone_config.num_hidden_layers
        check_between("num_layers", config.num_layers, stored)
        check_between("dim", config.dim, config.hidden_size)
        if config.num_layers < stored:
            config.backbone_config = cut_config(config.backbone_config, config.num_layers)
            config.cut_ladder(config.num_layers, config.hidden_size)
        self.backbone = build_backbone(config.backbone_config)
        config.layer_stack = check_layer_stack(self.backbone, config.layer_stack)
        config.final_norm = check_final_norm(self.backbone, config.layer_stack, config.final_norm)
        self.exit_projections = self._new_projections() if config.exit_projections else None
        self.exit_gates = self._new_gates() if config.exit_gates else None
        if config.num_layers < stored:
            # The folder of a deeper model may be read at this depth: its deeper layers are expected and not loaded.
            stack = config.layer_stack.replace(".", r"\.")
            deeper = "|".join(str(n) for n in range(config.num_layers, stored))
            parts = rf"backbone\.{stack}|exit_projections|exit_gates"
            self._keys_to_ignore_on_load_unexpected = [rf"^({parts})\.({deeper})\."]
        self._tokenizer = None
        self._packs = None
        self._cuts_later, self._hub_kwargs = False, {}
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike,
        sizes: Iterable[str | Size] | None = None,
        pooling: str | None = None,
        prompts: dict[str, str] | None = None,
        **kwargs,
    ) -> "TwoDMSEModel":
        """Import a pre-trained backbone.

        From a sentence-transformers folder, everything that changes its vectors is taken over: the pooling, the longest
        input, lower-casing, prompts, and Dense modules that are a matrix, which become the exit projections.

        Args:
            name_or_path: folder or Hub name of a text encoder that AutoModel loads.
            sizes: the ladder to train for, for example `["1x32", "6x384"]`.
            pooling: `mean`, `cls`, `lasttoken` or `weightedmean`; default: the pooling that a sentence-transformers
                folder declares, else `lasttoken` for decoders and `mean` for encoders. If given, modules of the folder
                that cannot be taken over are left out with a warning.
            prompts: texts that `encode(prompt_name=...)` puts in front, in addition to those of the folder.
            kwargs: passed to `AutoModel.from_pretrained` (`revision`, `dtype`, `attn_implementation`, ...).
                `trust_remote_code=True` also holds for the tokenizer; without it, no code of the folder is run.

        Returns:
            The elastic model, in evaluation mode.

        Raises:
            ValueError: the backbone's layers cannot be found or cut, it does not have one of the sizes, or the
                folder has a module or setting that cannot be taken over.
        """
        return import_backbone(cls, str(name_or_path), sizes, pooling, prompts, kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a saved elastic model.

        Args:
            pretrained_model_name_or_path: folder or Hub name of an elastic model.
            args: those of `PreTrainedModel.from_pretrained`.
            kwargs: those of `PreTrainedModel.from_pretrained`, and fields of the configuration: with `num_layers=n`,
                the layers above n are neither built nor read. `num_layers` and `dim` also hold with a `config`, and
                may be given as `size` or `truncate_dim`. `trust_remote_code=True` also holds for the tokenizer.

        Raises:
            ValueError: the weights do not fit the model, which would leave layers random, or are not finite.
        """
        wants_info, kwargs = kwargs.pop("output_loading_info", False), sized(kwargs)
        check_type(pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[Self, dict]", loaded)
        model._hub_kwargs = {**tokenizer_kwargs(pretrained_model_name_or_path, kwargs), "config": model.config}
        hint = f"{cls.__name__}.from_backbone imports a plain encoder"
        check_loaded(model, info, pretrained_model_name_or_path, hint)
        model._cuts_later = cuts_later(pretrained_model_name_or_path, model.config, **hub_kwargs(kwargs))
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return cast(torch.nn.Embedding, self.backbone.get_input_embeddings())

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> torch.nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; the backbone's configuration has the new size as well."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._note_vocabulary()
        return embeddings

    def _note_vocabulary(self) -> None:
        # The embeddings may also have been resized through the backbone.
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
        num_layers: int | None = None,
        layers: Sequence[int] | None = None,
        num_buckets: int = 1,
        lengths: Sequence[int] | None = None,
        packing: Packing | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TwoDMSEOutput:
        """Run the encoder.

        Args:
            input_ids: (batch, length) token ids, or give `inputs_embeds`.
            attention_mask: (batch, length), 1 for real tokens, 0 for padding; default: no padding.
            token_type_ids: (batch, length), for backbones that have segments.
            position_ids: (batch, length), for backbones that accept them.
            inputs_embeds: (batch, length, width) embeddings instead of `input_ids`.
            num_layers: layers to run; no deeper layer is run. Default: all.
            layers: exits, ascending. Their pooled states are returned, from one pass that runs max(layers) layers.
            num_buckets: with `layers`, run the rows in up to this many groups of similar length, each padded only to
                its own longest row; the pooled states are in the order of the rows. For padding on the right only.
            lengths: columns up to each row's last real token, if they are known without waiting for the GPU.
            packing: with `layers`, where each text is in `input_ids` of shape (1, tokens), if the model `packs`.
            output_hidden_states: None or false, which wrappers such as PEFT's pass.
            output_attentions: None or false.

        Raises:
            ValueError: arguments are given together that exclude each other, or the model does not have the layers.
        """
        # sentence-transformers' losses over layers set it in the configuration.
        if output_hidden_states or output_attentions or self.config.output_hidden_states:
            raise ValueError(
                "output_hidden_states: this model returns pooled states only; name exits in layers instead"
            )
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
        if attention_mask is None:
            tokens = inputs["inputs_embeds" if input_ids is None else "input_ids"]
            attention_mask = inputs["attention_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.long)
        if layers is None:
            depth = self.num_layers if num_layers is None else self._check_layers([num_layers])[0]
            state = self._exit_states(self.token_states([depth], inputs)[0], depth, attention_mask)
            return TwoDMSEOutput(last_hidden_state=state if self._cuts_later else state[..., : self.config.dim])
        if num_layers is not None:
            raise ValueError("layers: give either num_layers or layers, not both")
        layers = self._check_layers(layers)
        if packing is not None:
            if not self.packs:
                raise ValueError(f"packing: {type(self.backbone).__name__} runs padded batches only")
            inputs |= packed_inputs(self.backbone, packing)
        elif num_buckets > 1:
            return TwoDMSEOutput(layer_embeddings=self._bucketed(layers, inputs, num_buckets, lengths))
        states = self.token_states(layers, inputs)
        return TwoDMSEOutput(layer_embeddings=self._pool(layers, states, attention_mask, packing))

    def truncate(self, num_layers: int | None = None, dim: int | None = None) -> "TwoDMSEModel":
        """The model of a smaller size: it has only `num_layers` layers, and its `encode` keeps `dim` dimensions.

        Its weights share memory with this model until one of the two is moved or converted.

        Args:
            num_layers: layers to keep, 1 to N; default: all.
            dim: dimensions to keep by default, 1 to the hidden size; default: as in this model.

        Raises:
            ValueError: this model does not have the size, has PEFT adapters, or is spread over devices.
        """
        check_whole(self)
        config = copy.deepcopy(self.config)
        config.num_layers = self.num_layers if num_layers is None else self._check_layers([num_layers])[0]
        config.dim = self.config.dim if dim is None else self._check_dim(dim)
        config.cut_ladder(config.num_layers, config.dim)
        small = cut_model(self, config)
        small._tokenizer, small._hub_kwargs = self._tokenizer, self._hub_kwargs
        return small.train(self.training)

    def export(
        self,
        path: str | os.PathLike,
        num_layers: int | None = None,
        dim: int | None = None,
        format: str = "transformers",
        dtype: str = "float32",
    ) -> str:
        """Write one size as a small model that needs none of this code.

        Args:
            path: a folder that does not exist yet, or an empty one.
            num_layers: layers to keep, 1 to N; default: all.
            dim: dimensions to keep, 1 to the hidden size; default: `config.dim`.
            format: `transformers` (plain backbone) or `onnx` (`onnx/model.onnx`, from token ids to token states and
                unit vectors), both with a README.md and the files of sentence-transformers.
            dtype: type of the weights: `float32`, `float16`, `bfloat16`; for onnx `float32` or `int8`, which adds
                `onnx/model_quantized.onnx`.

        Returns:
            The folder.

        Raises:
            ValueError: this model does not have the size, the folder contains files, `format` or `dtype` is not
                allowed, or the size's exit has a gate that is not neutral, which `transformers` cannot hold.
        """
        check_export(str(path), format, dtype)
        return export(self.truncate(num_layers, dim), str(path), format, dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """Save the model as one folder that AutoModel, sentence-transformers and this package load.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes the tokenizer and the sentence-transformers files.
            args: those of `PreTrainedModel.save_pretrained`.
            kwargs: those of `PreTrainedModel.save_pretrained`.
        """
        self.config.architectures = [type(self).__name__]
        self._note_vocabulary()
        if not args and kwargs.get("state_dict") is None and not self._hf_peft_config_loaded:
            kwargs["state_dict"] = weights_to_save(self)
        if self._hf_peft_config_loaded:
            warn_of_base_size(self)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if not is_main_process:
            return
        share_weights(save_directory)
        max_length = None
        try:
            self.tokenizer.save_pretrained(save_directory)
            max_length = self.max_length
            finish_tokenizer(save_directory, self.tokenizer, max_length)
        except (OSError, ValueError) as error:
            # A model without a tokenizer can still be saved.
            logger.warning(f"saved without a tokenizer: {str(error).splitlines()[0]}")
        write_sentence_transformers_files(str(save_directory), self.config, max_length)

    def token_states(self, layers: Sequence[int], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """state(n) of every token, before any projection, for each n of `layers`, from one pass.

        Args:
            layers: exits, ascending.
            inputs: arguments of the backbone's forward; those that it does not accept are dropped.

        Returns:
            One (batch, length, hidden) tensor per exit.
        """
        accepted = accepted_inputs(self.backbone) | {"input_ids", "inputs_embeds", "packing"}
        options = {name: value for name, value in inputs.items() if name in accepted} | without_cache(self.backbone)
        return run_layers(self.backbone, self.config.layer_stack, self.config.final_norm, layers, **options)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, ExitProjection):
            init.eye_(module.weight)
        elif isinstance(module, ExitGate):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def _bucketed(
        self, layers: Sequence[int], inputs: dict[str, torch.Tensor], num_buckets: int, lengths: Sequence[int] | None
    ) -> torch.Tensor:
        mask, pooled = inputs["attention_mask"], []
        groups = tight_groups(row_lengths(mask) if lengths is None else lengths, num_buckets)
        parts = []
        for index, width in groups:
            rows = torch.from_numpy(index).to(mask.device, non_blocking=True)
            parts.append(
                {
                    name: (value[rows] if value.shape[0] == len(mask) else value)[:, :width]
                    for name, value in inputs.items()
                }
            )
        self._look_up_words_once(parts)
        for part in parts:
            pooled.append(self._pool(layers, self.token_states(layers, part), part["attention_mask"]))
        return torch.cat(pooled, dim=1)[:, back_in_order(groups).to(mask.device, non_blocking=True)]

    def _look_up_words_once(self, parts: list[dict[str, torch.Tensor]]) -> None:
        # The gradient of an embedding look-up is as large as the vocabulary: one for all buckets, not one per bucket.
        # With several processes the table may be sharded (FSDP), and only the backbone's own forward gathers it.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed or "input_ids" not in parts[0] or not supports_inputs_embeds(self.backbone):
            return
        ids = [part.pop("input_ids") for part in parts]
        words = self.get_input_embeddings()(torch.cat([part.flatten() for part in ids]))
        for part, own, vectors in zip(parts, ids, words.split([part.numel() for part in ids]), strict=True):
            part["inputs_embeds"] = vectors.view(*own.shape, -1)


TwoDMSEModel.register_for_auto_class("AutoModel")

__all__ = ["TwoDMSEModel"]
