"""TwoDMSEModel: a text encoder that gives an embedding at any number of layers and any number of dimensions."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .backbone import (
    accepted_inputs,
    build_backbone,
    check_exits,
    count_positions,
    cut_config,
    drop_pooler,
    find_final_norms,
    find_layer_stack,
    run_layers,
)
from .configuration_2dmse import TwoDMSEConfig
from .encoding import check_batch_size, check_texts, pooled_states, quantize
from .pooling import cut_and_normalize, pool
from .sentence_transformers_files import read_pooling, write_sentence_transformers_files

logger = logging.get_logger(__name__)


@dataclass
class TwoDMSEOutput(ModelOutput):
    """
    Output of [`TwoDMSEModel`].

    Args:
        last_hidden_state (`torch.Tensor`, (batch, length, hidden)): token states of the deepest exit, behind the
            backbone's final norm. None when the rows ran in buckets of different lengths.
        layer_embeddings (`torch.Tensor`, (len(layers), batch, hidden), float32): pooled states of the exits asked
            for with `layers`, neither cut nor normalised. None when `layers` was not given.
    """

    last_hidden_state: torch.Tensor | None = None
    layer_embeddings: torch.Tensor | None = None


class TwoDMSEModel(PreTrainedModel):
    """
    An elastic encoder around any text backbone of transformers (2DMSE, Li et al. 2024; Starbucks, Zhuang et al. 2024).

    embedding(n, d) = normalize(pool(state(n), attention_mask)[:d]), where state(n) is what n layers and the
    backbone's own final norm give. A model cut to n layers and saved gives exactly what the full one gives at n.
    """

    config_class = TwoDMSEConfig
    base_model_prefix = "twodmse"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss belongs to the trainer, and is not normalised by a number of items.
    accepts_loss_kwargs = False

    def __init__(self, config: TwoDMSEConfig):
        super().__init__(config)
        stored = config.backbone_config.num_hidden_layers
        _check_between("num_layers", config.num_layers, stored)
        _check_between("dim", config.dim, config.hidden_size)
        if config.num_layers < stored:
            config.backbone_config = cut_config(config.backbone_config, config.num_layers)
            config.cut_ladder(config.num_layers, config.hidden_size)
        self.backbone = build_backbone(config.backbone_config)
        if config.layer_stack is None:
            config.layer_stack = find_layer_stack(self.backbone)
        if config.final_norm is None:
            config.final_norm = find_final_norms(self.backbone, config.layer_stack)[0]
        if config.num_layers < stored:
            # A folder of the whole model is being read at a smaller depth: its deeper layers are not meant for us.
            stack = config.layer_stack.replace(".", r"\.")
            deeper = "|".join(str(n) for n in range(config.num_layers, stored))
            self._keys_to_ignore_on_load_unexpected = [rf"^backbone\.{stack}\.({deeper})\."]
        self._tokenizer = None
        self._hub_kwargs = {}
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_path, sizes=None, pooling=None, prompts=None, **kwargs) -> "TwoDMSEModel":
        """
        Import a pre-trained backbone.

        Args:
            name_or_path: folder or Hub name of a text encoder that AutoModel loads.
            sizes: the ladder to train for, for example `["1x32", "6x384"]`.
            pooling: `mean`, `cls`, `lasttoken` or `weightedmean`; by default what a sentence-transformers folder
                declares, else `lasttoken` for decoders and `mean` for encoders.
            prompts: texts that `encode(prompt_name=...)` puts in front.
            kwargs: passed to `AutoModel.from_pretrained` (`revision`, `dtype`, `attn_implementation`, ...).

        Raises:
            ValueError: the backbone's layers cannot be found or cut, or a size does not fit it.
        """
        name_or_path = str(name_or_path)
        backbone = drop_pooler(AutoModel.from_pretrained(name_or_path, **kwargs))
        if getattr(backbone.config, "is_encoder_decoder", False):
            raise ValueError(f"backbone: {type(backbone).__name__} has an encoder and a decoder; use one of the two")
        if isinstance(backbone, cls):
            raise ValueError(f"name_or_path: {name_or_path} is an elastic model already; load it with from_pretrained")
        if pooling is None:
            pooling = read_pooling(name_or_path, **_hub_kwargs(kwargs))
            pooling = pooling or ("lasttoken" if _is_decoder(backbone) else "mean")
        stack = find_layer_stack(backbone)
        config = TwoDMSEConfig(
            backbone_config=backbone.config,
            pooling=pooling,
            sizes=sizes,
            prompts=prompts,
            layer_stack=stack,
            final_norm=check_exits(backbone, stack),
            dtype=backbone.dtype,
        )
        with torch.device("meta"):
            model = cls(config)
        if os.path.isdir(name_or_path):
            backbone.config.name_or_path = ""  # a folder of this machine says nothing to whoever loads the model
        model.backbone = backbone
        model.config.backbone_config = backbone.config
        model.config.name_or_path = name_or_path
        model._hub_kwargs = _hub_kwargs(kwargs)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        Load a saved elastic model; `num_layers=n` neither builds nor reads the layers above n.

        Raises:
            ValueError: the weights do not fill the model, which would leave layers with random weights.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model._hub_kwargs = _hub_kwargs(kwargs)
        absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        if absent:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights lack {len(absent)} of the tensors that config.json "
                f"({model.config.num_layers} layers) asks for, {absent[0]} among them; they would be random "
                "(a plain encoder is imported with TwoDMSEModel.from_backbone)"
            )
        return (model, info) if wants_info else model

    @property
    def num_layers(self) -> int:
        """Transformer layers of this model."""
        return self.config.num_layers

    @property
    def tokenizer(self):
        """The tokenizer of the folder or repository that the model was loaded from."""
        if self._tokenizer is None:
            if not self.config.name_or_path:
                raise ValueError("tokenizer: this model was not loaded from a folder; set model.tokenizer first")
            self.tokenizer = AutoTokenizer.from_pretrained(self.config.name_or_path, **self._hub_kwargs)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # Llama's has none; padding is masked whatever it is
        self._tokenizer = tokenizer

    @property
    def max_length(self) -> int:
        """Longest input in tokens: the smaller of what the tokenizer and the positions of the backbone allow."""
        return min(self.tokenizer.model_max_length, count_positions(self.backbone))

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
        num_layers: int | None = None,
        layers: Sequence[int] | None = None,
        num_buckets: int = 1,
    ) -> TwoDMSEOutput:
        """
        Run the encoder.

        Args:
            input_ids: (batch, length); or `inputs_embeds`, (batch, length, width).
            attention_mask: (batch, length), 1 for real tokens; all real when left out.
            num_layers: layers to run, all when left out. No layer above is run.
            layers: exits, ascending; their pooled states come back from one pass that runs max(layers) layers.
            num_buckets: with `layers`, sort the rows by length and run them in this many groups, each padded only
                to its own longest row; the pooled states come back in the rows' order. Padding on the right only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either input_ids or inputs_embeds")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if layers is None:
            depth = self.num_layers if num_layers is None else self._check_layers([num_layers])[0]
            return TwoDMSEOutput(last_hidden_state=self._states([depth], inputs)[0])
        if num_layers is not None:
            raise ValueError("layers: give either num_layers or layers, not both")
        layers = self._check_layers(layers)
        if num_buckets > 1:
            return TwoDMSEOutput(layer_embeddings=self._bucketed(layers, inputs, num_buckets))
        states = self._states(layers, inputs)
        return TwoDMSEOutput(last_hidden_state=states[-1], layer_embeddings=self._pool(states, attention_mask))

    def truncate(self, num_layers: int | None = None, dim: int | None = None) -> "TwoDMSEModel":
        """
        The model of a smaller size, a model in its own right: fewer layers, and `encode` keeps `dim` dimensions.

        Its weights share this model's memory until one of the two is moved or converted.
        """
        config = copy.deepcopy(self.config)
        config.num_layers = self.num_layers if num_layers is None else self._check_layers([num_layers])[0]
        config.dim = self.config.dim if dim is None else self._check_dim(dim)
        config.cut_ladder(config.num_layers, config.dim)
        with torch.device("meta"):
            small = type(self)(config)
        tensors = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers(remove_duplicate=False))
        for name, module in small.named_modules():
            for key in module._parameters:
                if module._parameters[key] is not None:
                    source = tensors[f"{name}.{key}"]
                    module._parameters[key] = torch.nn.Parameter(source.detach(), requires_grad=source.requires_grad)
            for key in module._buffers:
                if module._buffers[key] is not None:
                    module._buffers[key] = tensors[f"{name}.{key}"]
        small.tie_weights()
        small._tokenizer, small._hub_kwargs = self._tokenizer, self._hub_kwargs
        return small.train(self.training)

    def encode(
        self,
        texts: str | Sequence[str],
        num_layers: int | None = None,
        dim: int | None = None,
        batch_size: int = 32,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
        precision: str = "float32",
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | torch.Tensor:
        """
        Embed texts at one size.

        Args:
            texts: a string, or a list of strings.
            num_layers: layers to run, 1 to N; the model's own number when left out.
            dim: dimensions to keep, 1 to the hidden size; the model's own number when left out.
            batch_size: texts a batch; batches are filled by length.
            prompt: text put in front of every text; or `prompt_name`, one of the config's prompts.
            max_length: in tokens; longer texts are cut.
            precision: `float32`, `float16`, `int8` or `binary`, see `encoding.quantize`.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: by default on work of 20 batches and more.

        Returns:
            (len(texts), dim) unit vectors in the texts' order, or (dim,) for a single string.
        """
        dim = self.config.dim if dim is None else self._check_dim(dim)
        layers = [self.num_layers if num_layers is None else num_layers]
        check_batch_size(batch_size)
        texts, single = check_texts(texts)
        states = self.encode_states(
            texts, layers, batch_size, self._find_prompt(prompt, prompt_name), max_length, show_progress_bar
        )
        embeddings = quantize(cut_and_normalize(states[0], dim), precision)
        embeddings = embeddings[0] if single else embeddings
        return embeddings.to(self.device) if convert_to_tensor else embeddings.numpy()

    def encode_states(
        self,
        texts: Sequence[str],
        layers: Sequence[int] | None = None,
        batch_size: int = 32,
        prompt: str = "",
        max_length: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> torch.Tensor:
        """
        Pooled states of texts at several exits, each text read once; every size is a slice of them.

        Args:
            layers: exits, ascending; all layers when left out.

        Returns:
            (len(layers), len(texts), hidden), float32, on the CPU, neither cut nor normalised.
        """
        layers = self._check_layers(range(1, self.num_layers + 1) if layers is None else layers)
        if not texts:
            return torch.empty(len(layers), 0, self.config.hidden_size)
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                return pooled_states(
                    lambda batch: self(**batch, layers=layers).layer_embeddings,
                    self.tokenizer,
                    [prompt + text for text in texts] if prompt else texts,
                    min(max_length or self.max_length, self.max_length),
                    batch_size,
                    self.device,
                    show_progress_bar,
                )
        finally:
            self.train(training)

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """Save the model as ONE folder that AutoModel, sentence-transformers and this package load."""
        self.config.architectures = [type(self).__name__]
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        max_length = None
        try:
            self.tokenizer.save_pretrained(save_directory)
            max_length = self.max_length
        except (OSError, ValueError) as error:
            # A model that came without a tokenizer is still a model.
            logger.warning(f"saved without a tokenizer: {str(error).splitlines()[0]}")
        write_sentence_transformers_files(str(save_directory), self.config, max_length)

    def _states(self, layers: Sequence[int], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        accepted = accepted_inputs(self.backbone) | {"input_ids", "inputs_embeds"}
        inputs = {name: value for name, value in inputs.items() if name in accepted}
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return run_layers(self.backbone, self.config.layer_stack, self.config.final_norm, layers, **inputs)

    def _pool(self, states: Sequence[torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([pool(state, attention_mask, self.config.pooling) for state in states])

    def _bucketed(self, layers, inputs: dict[str, torch.Tensor], num_buckets: int) -> torch.Tensor:
        mask = inputs["attention_mask"]
        # Trailing columns alone are cut: absolute positions stay as they are.
        columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        widths = (mask.to(torch.long) * columns).amax(dim=1)
        order = widths.argsort(stable=True)
        groups = [group for group in order.tensor_split(num_buckets) if len(group)]
        longest = torch.stack([widths[group[-1]] for group in groups]).tolist()
        pooled = []
        for group, width in zip(groups, longest, strict=True):
            part = {
                name: (value[group] if value.shape[0] == len(mask) else value)[:, : max(width, 1)]
                for name, value in inputs.items()
            }
            pooled.append(self._pool(self._states(layers, part), part["attention_mask"]))
        return torch.cat(pooled, dim=1)[:, order.argsort()]

    def _check_layers(self, layers) -> list[int]:
        layers = list(layers)
        for n in layers:
            _check_between("num_layers" if len(layers) == 1 else "layers", n, self.num_layers)
        if not layers or sorted(set(layers)) != layers:
            raise ValueError(f"layers: {layers} must ascend and name each layer once, from 1 to {self.num_layers}")
        return layers

    def _check_dim(self, dim) -> int:
        _check_between("dim", dim, self.config.hidden_size)
        return dim

    def _find_prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            return prompt
        name = name if name is not None else self.config.default_prompt_name
        if name is None:
            return ""
        if name not in self.config.prompts:
            known = ", ".join(sorted(self.config.prompts)) or "none is set"
            raise ValueError(f"prompt_name: {name!r} is unknown; this model's prompts: {known}")
        return self.config.prompts[name]


def _check_between(name: str, value, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise ValueError(f"{name}: {value!r} is not allowed; this model has 1 to {highest}")


def _hub_kwargs(kwargs: dict) -> dict:
    """What the companions of the weights (tokenizer, pooling) must be fetched with as well."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def _is_decoder(backbone: PreTrainedModel) -> bool:
    config = backbone.config
    causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
    return bool(getattr(config, "is_decoder", False) or causal)


TwoDMSEModel.register_for_auto_class("AutoModel")

__all__ = ["TwoDMSEModel", "TwoDMSEOutput"]
