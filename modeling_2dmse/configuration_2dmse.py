"""The configuration of an elastic encoder, and the notation of its sizes."""

import re
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

POOLING_MODES = ("mean", "cls", "lasttoken", "weightedmean")


class Size(NamedTuple):
    """A size of the encoder, written `6x128`: run 6 transformer layers, keep the first 128 dimensions."""

    num_layers: int
    dim: int

    def __str__(self) -> str:
        return f"{self.num_layers}x{self.dim}"


def parse_size(text) -> Size:
    """Read one size.

    >>> parse_size("6x128")
    Size(num_layers=6, dim=128)
    """
    if isinstance(text, (tuple, list)) and len(text) == 2:
        text = f"{text[0]}x{text[1]}"
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(text).strip())
    if not match:
        raise ValueError(
            f"sizes: {str(text)!r} is not a size; write LAYERSxDIM with whole numbers from 1, for example 6x128"
        )
    return Size(int(match[1]), int(match[2]))


def parse_ladder(sizes, num_layers: int | None = None, hidden_size: int | None = None) -> list[Size]:
    """Read a ladder, small to large, and check it against a backbone when one is given.

    >>> [str(size) for size in parse_ladder(["2x64", "1x32"])]
    ['1x32', '2x64']
    """
    ladder = [parse_size(size) for size in sizes]
    if not ladder:
        raise ValueError("sizes: the ladder is empty; name at least one size, for example 6x128")
    twice = sorted({str(size) for size in ladder if ladder.count(size) > 1})
    if twice:
        raise ValueError(f"sizes: {', '.join(twice)} stands more than once in the ladder; name each size once")
    for size in ladder:
        if num_layers is not None and size.num_layers > num_layers:
            raise ValueError(f"sizes: {size} asks for {size.num_layers} layers, but the backbone has 1 to {num_layers}")
        if hidden_size is not None and size.dim > hidden_size:
            raise ValueError(f"sizes: {size} asks for {size.dim} dimensions, but the backbone has 1 to {hidden_size}")
    return sorted(ladder)


class TwoDMSEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TwoDMSEModel`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`): configuration of the text encoder inside; BERT when left out.
        pooling (`str`): `mean`, `cls`, `lasttoken` or `weightedmean` (weights 1, 2, ... over the real tokens).
        sizes (`list[str]`, *optional*): the ladder the model is trained for, for example `["1x32", "6x384"]`.
        num_layers (`int`, *optional*): layers that are built and run by default; all of the backbone when left out.
        dim (`int`, *optional*): dimensions that `encode` keeps by default; the hidden size when left out.
        prompts (`dict[str, str]`, *optional*): texts that `encode(prompt_name=...)` puts in front.
        default_prompt_name (`str`, *optional*): the prompt that `encode` uses when none is named.
        layer_stack (`str`, *optional*): path of the backbone's list of layers; found by search when left out.
        final_norm (`str`, *optional*): path of the norm behind the last layer, `""` for none; found when left out.
        exit_projections (`bool`): the state of each exit goes through a square matrix of its own.
    """

    model_type = "2dmse"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        pooling="mean",
        sizes=None,
        num_layers=None,
        dim=None,
        prompts=None,
        default_prompt_name=None,
        layer_stack=None,
        final_norm=None,
        exit_projections=False,
        **kwargs,
    ):
        if backbone_config is None:
            backbone_config = AutoConfig.for_model("bert")
        elif isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if pooling not in POOLING_MODES:
            raise ValueError(f"pooling: {pooling!r} is unknown; choose one of {', '.join(POOLING_MODES)}")
        self.backbone_config = backbone_config
        self.pooling = pooling
        self.num_layers = num_layers if num_layers is not None else backbone_config.num_hidden_layers
        self.hidden_size = backbone_config.hidden_size
        self.dim = dim if dim is not None else self.hidden_size
        self.prompts = dict(prompts or {})
        self.default_prompt_name = default_prompt_name
        self.layer_stack = layer_stack
        self.final_norm = final_norm
        self.exit_projections = exit_projections
        self.sizes = None
        # The keys below are derived; a config file holds them for the readers that look for them.
        for derived in ("is_matryoshka", "matryoshka_dimensions", "hidden_size", "num_hidden_layers"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)
        self.set_ladder(sizes)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model; sentence-transformers and vLLM read it under this name."""
        return self.num_layers

    @property
    def ladder(self) -> list[Size]:
        """The sizes the model was trained for, small to large; its full size when it was given none."""
        return parse_ladder(self.sizes) if self.sizes else [Size(self.num_layers, self.dim)]

    def set_ladder(self, sizes) -> None:
        """Set the sizes the model is trained for; ValueError if the backbone cannot give one of them."""
        if not sizes:
            self.sizes = None
            return
        backbone = self.backbone_config
        self.sizes = [str(size) for size in parse_ladder(sizes, backbone.num_hidden_layers, self.hidden_size)]

    def cut_ladder(self, num_layers: int, dim: int) -> None:
        """Drop the sizes that are larger than (num_layers, dim)."""
        self.set_ladder([s for s in map(parse_size, self.sizes or []) if s.num_layers <= num_layers and s.dim <= dim])

    def to_dict(self):
        """The configuration as JSON holds it, with the keys that other libraries read."""
        output = super().to_dict()
        output["num_hidden_layers"] = self.num_layers
        output["is_matryoshka"] = True
        output["matryoshka_dimensions"] = sorted({size.dim for size in self.ladder})
        return output


TwoDMSEConfig.register_for_auto_class()

__all__ = ["POOLING_MODES", "Size", "TwoDMSEConfig", "parse_ladder", "parse_size"]
