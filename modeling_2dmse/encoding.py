"""`encode` and what belongs to it: the tokenizer, prompts, and pooled states of several exits."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .backbone import count_positions, layers_of
from .batching import check_batch_size, check_texts, default_batch_tokens, pooled_states
from .configuration_2dmse import Size, TwoDMSEConfig, one_size
from .formats import check_precision, quantize
from .packing import find_packing, is_compiled
from .pooling import cut_and_normalize
from .running import execution_device, inference_twin
from .synonyms import Texts, move, one_of_texts

# The mixin is combined with PreTrainedModel, and calls its methods; type checkers need to know them.
if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


def check_between(name: str, value: int, highest: int) -> None:
    """ValueError unless `value` is a whole number from 1 to `highest`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= highest:
        raise ValueError(f"{name}: {value!r} is not allowed; this model has 1 to {highest}")


def to_embeddings(pooled: torch.Tensor, dim: int, similarity: str) -> torch.Tensor:
    """The embeddings of a size.

    Args:
        pooled: (..., hidden), the pooled states of the size's exit.
        dim: dimensions to keep.
        similarity: `cosine` or `dot`; embeddings are only normalised for `cosine`.

    Returns:
        (..., dim) in float32.

    >>> to_embeddings(torch.tensor([[3.0, 4.0, 12.0]]), 2, "dot").tolist()
    [[3.0, 4.0]]
    """
    return pooled[..., :dim].float().contiguous() if similarity == "dot" else cut_and_normalize(pooled, dim)


class EncodeMixin(_Model):
    """`encode` and what it needs, for a `PreTrainedModel` around a `backbone` whose forward takes `layers`."""

    config: TwoDMSEConfig
    backbone: PreTrainedModel
    _tokenizer: PreTrainedTokenizerBase | None
    _hub_kwargs: dict
    _packs: bool | None

    @property
    def num_layers(self) -> int:
        """Transformer layers of this model."""
        return self.config.num_layers

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder or repository that the model was loaded from.

        Raises:
            ValueError: the model was not loaded from a folder, and no tokenizer was set; or the tokenizer needs code of
                the folder, and the model was loaded without `trust_remote_code=True`.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            if not self.config.name_or_path:
                raise ValueError("tokenizer: this model was not loaded from a folder; set model.tokenizer first")
            options = self._hub_kwargs or {"config": self.config, "trust_remote_code": False}
            options = {"pretrained_model_name_or_path": self.config.name_or_path} | options
            tokenizer = AutoTokenizer.from_pretrained(**options)
            self.tokenizer = tokenizer
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # Llama's has none; padding is masked, whichever token it is
        self._tokenizer = tokenizer

    @property
    def max_length(self) -> int:
        """Longest input in tokens: the smaller of the tokenizer's limit and the backbone's number of positions."""
        return min(self.tokenizer.model_max_length, count_positions(self.backbone))

    @property
    def input_device(self) -> torch.device:
        """Where the tokens of texts go, see `running.execution_device`."""
        return execution_device(self)

    def encode(
        self,
        texts: Texts | None = None,
        num_layers: int | None = None,
        dim: int | None = None,
        batch_size: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
        precision: str = "float32",
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
        size: str | Size | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool | None = None,
        convert_to_numpy: bool | None = None,
        device: str | torch.device | int | None = None,
        sentences: Texts | None = None,
        inputs: Texts | None = None,
    ) -> np.ndarray | torch.Tensor:
        """Embed texts at one size.

        Args:
            texts: a string, or a list of strings.
            num_layers: layers to run, 1 to N; default: all layers of this model.
            dim: dimensions to keep, 1 to the hidden size; default: `config.dim`.
            batch_size: most texts per batch when they are the longest. Batches of shorter texts hold more texts and as
                many tokens. Default: as many tokens as suit the device, see `batching.default_batch_tokens`.
            prompt: text put in front of every text.
            prompt_name: name of one of `config.prompts` to put in front, if `prompt` is not given.
            max_length: in tokens, special tokens included; longer texts are truncated.
            precision: `float32`, `float16`, `int8` or `binary`, see `formats.quantize`.
            convert_to_tensor: return a tensor on the model's device instead of a numpy array.
            show_progress_bar: default: for 640 texts or more, on a terminal.
            size: layers and dimensions together, for example `"2x64"`.
            truncate_dim: another name of `dim`, that of sentence-transformers.
            normalize_embeddings: for calls written for sentence-transformers: as with a model that ends with its
                Normalize module, vectors have unit length whether it is true or false.
            convert_to_numpy: for such calls too; without `convert_to_tensor`, the result is an array in any case.
            device: moves the model there first, as sentence-transformers does.
            sentences: another name of `texts`, that of sentence-transformers.
            inputs: the same, since its version 6.

        Returns:
            (len(texts), dim) in the order of the texts, or (dim,) for a single string. They are unit vectors, unless
            `config.similarity` is `dot`.

        Raises:
            ValueError: an item is not a string, the model does not have the size, texts or size are given twice, or
                `batch_size`, `max_length`, `prompt_name`, `precision` or `device` is not allowed.
        """
        num_layers, dim = one_size(num_layers, dim, size, truncate_dim)
        dim = self.config.dim if dim is None else self._check_dim(dim)
        layers = [self.num_layers if num_layers is None else num_layers]
        if batch_size is not None:
            check_batch_size(batch_size)
        check_precision(precision, self.config.similarity)
        texts, single = check_texts(one_of_texts(texts, sentences, inputs))
        move(self, device)
        states = self.encode_states(
            texts, layers, batch_size, self.find_prompt(prompt, prompt_name), max_length, show_progress_bar
        )
        embeddings = quantize(to_embeddings(states[0], dim, self.config.similarity), precision)
        embeddings = embeddings[0] if single else embeddings
        return embeddings.to(self.input_device) if convert_to_tensor else embeddings.numpy()

    def encode_states(
        self,
        texts: Sequence[str],
        layers: Iterable[int] | None = None,
        batch_size: int | None = None,
        prompt: str = "",
        max_length: int | None = None,
        show_progress_bar: bool | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Pooled states of texts at several exits; each text is read once, and every size is a slice of the result.

        Args:
            texts: a list of strings.
            layers: exits, ascending; default: all layers.
            batch_size: as in `encode`.
            prompt: text put in front of every text.
            max_length: as in `encode`.
            show_progress_bar: as in `encode`.
            progress: called after each batch with its number of texts, for a bar over several calls.

        Returns:
            (len(layers), len(texts), hidden), float32, on the CPU, neither cut nor normalised.
        """
        exits = self._check_layers(range(1, self.num_layers + 1) if layers is None else layers)
        if max_length is not None:
            self._check_max_length(max_length)
        if not texts:
            return torch.empty(len(exits), 0, self.config.hidden_size)
        layers_of(self.backbone, self.config.layer_stack)  # which names a part that is wrapped
        tokenizer, longest, device = self.tokenizer, self.max_length, self.input_device
        if device.type == "meta":
            raise ValueError("model: its weights are on the meta device, which keeps no values; load it to another one")
        model = inference_twin(self)
        with torch.inference_mode():
            return pooled_states(
                lambda batch: model(**batch, layers=exits).layer_embeddings,
                tokenizer,
                [prompt + text for text in texts] if prompt else texts,
                min(max_length or longest, longest),
                self._batch_tokens(),
                batch_size,
                device,
                packs=lambda: self.device.type != "meta" and not is_compiled(model) and self.packs,
                show_progress_bar=show_progress_bar,
                progress=progress,
                vocabulary=getattr(self.get_input_embeddings(), "num_embeddings", None),
            )

    @property
    def packs(self) -> bool:
        """Whether texts may run as one packed row; found by trying on first use, see `packing.find_packing`."""
        if self._packs is None:
            self._packs = find_packing(self.backbone)
        return self._packs

    def _batch_tokens(self) -> int:
        config = self.config.backbone_config
        width = getattr(config, "intermediate_size", None) or 4 * self.config.hidden_size
        return default_batch_tokens(self.input_device, self.config.hidden_size, width)

    def find_prompt(self, prompt: str | None = None, name: str | None = None) -> str:
        """The text to put in front of every text.

        Args:
            prompt: the text itself, which comes first.
            name: of a prompt in `config.prompts`; default: `config.default_prompt_name`.

        Returns:
            The text, `""` if neither is given and there is no default.

        Raises:
            ValueError: `prompt` is no text, or the configuration has no prompt of that name.
        """
        if prompt is not None:
            if not isinstance(prompt, str):
                raise ValueError(f"prompt: {prompt!r} is not allowed; give one text, which goes in front of every text")
            return prompt
        name = name if name is not None else self.config.default_prompt_name
        if name is None:
            return ""
        if name not in self.config.prompts:
            known = ", ".join(sorted(self.config.prompts)) or "none is set"
            raise ValueError(f"prompt_name: {name!r} is unknown; this model's prompts: {known}")
        return self.config.prompts[name]

    def _check_layers(self, layers: Iterable[int]) -> list[int]:
        layers = list(layers)
        for n in layers:
            check_between("num_layers" if len(layers) == 1 else "layers", n, self.num_layers)
        if not layers or sorted(set(layers)) != layers:
            raise ValueError(f"layers: {layers} must ascend and name each layer once, from 1 to {self.num_layers}")
        return list(map(int, layers))

    def _check_max_length(self, max_length: int) -> None:
        lowest = self.tokenizer.num_special_tokens_to_add() + 1
        if isinstance(max_length, bool) or not isinstance(max_length, Integral) or max_length < lowest:
            raise ValueError(
                f"max_length: {max_length!r} is not allowed; use a whole number from {lowest}, the fewest tokens of a "
                "text that is not empty"
            )

    def _check_dim(self, dim: int) -> int:
        check_between("dim", dim, self.config.hidden_size)
        return int(dim)
