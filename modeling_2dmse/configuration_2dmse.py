"""The configuration of an elastic encoder, and the notation for its sizes."""

import copy
import itertools
import re
from collections.abc import Iterable
from numbers import Integral
from typing import NamedTuple

import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # before a name is imported that older versions do not have
    raise ImportError(
        f"2DMSE models need transformers 5 or newer, not {transformers.__version__}; upgrade transformers"
    )

from transformers import AutoConfig, PreTrainedConfig

POOLING_MODES = ("mean", "cls", "lasttoken", "weightedmean")
# Those whose mean a gate can weigh; the others take one token.
WEIGHED_POOLING_MODES = ("mean", "weightedmean")
SIMILARITIES = ("cosine", "dot")


class Size(NamedTuple):
    """A size of the encoder, written `6x128`: run 6 transformer layers, keep the first 128 dimensions.

    Attributes:
        num_layers: layers to run, from 1.
        dim: dimensions to keep, from 1.

    >>> str(Size(6, 128))
    '6x128'
    """

    num_layers: int
    dim: int

    def __str__(self) -> str:
        return f"{self.num_layers}x{self.dim}"


def parse_size(text: str | Size | tuple[int, int] | list[int], argument: str = "sizes") -> Size:
    """Read one size.

    Args:
        text: a size as text, or a pair (num_layers, dim).
        argument: the name that the error gives to it.

    Raises:
        ValueError: the text is not a size.

    >>> parse_size("6x128")
    Size(num_layers=6, dim=128)
    """
    if isinstance(text, (tuple, list)) and len(text) == 2:
        text = f"{text[0]}x{text[1]}"
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", str(text).strip())
    if not match:
        raise ValueError(
            f"{argument}: {str(text)!r} is not a size; write LAYERSxDIM with whole numbers from 1, for example 6x128"
        )
    return Size(int(match[1]), int(match[2]))


def parse_ladder(
    sizes: str | Iterable[str | Size | tuple[int, int] | list[int]],
    num_layers: int | None = None,
    hidden_size: int | None = None,
) -> list[Size]:
    """Read a ladder, and check it against a backbone if one is given.

    Args:
        sizes: in any order, or one size.
        num_layers: layers of the backbone.
        hidden_size: dimensions of the backbone.

    Returns:
        The sizes, small to large.

    Raises:
        ValueError: there are no sizes, one appears twice, or the backbone does not have one of them.

    >>> [str(size) for size in parse_ladder(["2x64", "1x32"])]
    ['1x32', '2x64']
    """
    ladder = [parse_size(size) for size in ([sizes] if isinstance(sizes, str) else sizes)]
    if not ladder:
        raise ValueError("sizes: the ladder is empty; name at least one size, for example 6x128")
    twice = sorted({str(size) for size in ladder if ladder.count(size) > 1})
    if twice:
        raise ValueError(f"sizes: {', '.join(twice)} appears more than once in the ladder; name each size once")
    for size in ladder:
        if num_layers is not None and size.num_layers > num_layers:
            raise ValueError(f"sizes: {size} asks for {size.num_layers} layers, but the backbone has 1 to {num_layers}")
        if hidden_size is not None and size.dim > hidden_size:
            raise ValueError(f"sizes: {size} asks for {size.dim} dimensions, but the backbone has 1 to {hidden_size}")
    return sorted(ladder)


def one_size(
    num_layers: int | None, dim: int | None, size: str | Size | None, truncate_dim: int | None
) -> tuple[int | None, int | None]:
    """Layers and dimensions that are asked for, under any of their names.

    Raises:
        ValueError: one of them is given under two names, or `size` is not a size.
    """
    if size is not None:
        if (num_layers, dim, truncate_dim) != (None, None, None):
            raise ValueError(f"size: {size} sets layers and dimensions; leave out num_layers, dim and truncate_dim")
        return parse_size(size, "size")
    if truncate_dim is not None:
        if dim not in (None, truncate_dim):
            raise ValueError(f"truncate_dim: {truncate_dim} differs from dim, {dim}; give one of the two")
        dim = truncate_dim
    return num_layers, dim


def size_fields(kwargs: dict) -> dict:
    """Arguments with the size among them as `num_layers` and `dim`, whatever names it is given under.

    Raises:
        ValueError: as `one_size`.
    """
    names = ("num_layers", "dim", "size", "truncate_dim")
    others = {name: value for name, value in kwargs.items() if name not in names}
    found = dict(zip(names[:2], one_size(*map(kwargs.get, names)), strict=True))
    for name, value in found.items():
        if isinstance(value, Integral) and not isinstance(value, bool):
            found[name] = int(value)  # JSON, which a configuration is written as, has no others
    return others | {name: value for name, value in found.items() if value is not None}


def default_ladder(num_layers: int, dim: int) -> list[Size]:
    """Up to six sizes for a model: evenly spaced layers, and powers of two below the full dimensions.

    If there are fewer than six of them from 32 on, dimensions half way between two others are added.

    >>> " ".join(map(str, default_ladder(12, 768)))
    '2x32 4x64 6x128 8x256 10x512 12x768'
    >>> " ".join(map(str, default_ladder(6, 384)))
    '1x32 2x64 3x128 4x192 5x256 6x384'
    """
    smallest = 32 if dim >= 256 else 8
    dims = [1 << power for power in range(dim.bit_length()) if smallest <= 1 << power < dim] + [dim]
    while len(dims) < 6 and (gap := max(above - below for below, above in itertools.pairwise([0, *dims]))) > 8:
        wide = next(below for below, above in itertools.pairwise([0, *dims]) if above - below == gap)
        dims = sorted([*dims, wide + gap // 2])
    count = min(6, num_layers, len(dims))
    steps = range(1, count + 1)
    return [Size(round(num_layers * step / count), dims[round(len(dims) * step / count) - 1]) for step in steps]


class TwoDMSEConfig(PreTrainedConfig):
    """Configuration of a `TwoDMSEModel`.

    Args:
        backbone_config (PreTrainedConfig | dict | None): configuration of the text encoder inside; default: BERT.
        pooling (str): `mean`, `cls`, `lasttoken` or `weightedmean` (weights 1, 2, ... over the real tokens).
        sizes (list[str] | None): the ladder that the model is trained for, for example `["1x32", "6x384"]`.
        num_layers (int | None): layers that are built, and run by default; default: all layers of the backbone.
        dim (int | None): dimensions that `encode` keeps by default; default: the hidden size.
        prompts (dict[str, str] | None): texts that `encode(prompt_name=...)` puts in front; retrieval is evaluated with
            those named `query` and `document`.
        default_prompt_name (str | None): the prompt that `encode` uses if none is named.
        layer_stack (str | None): path of the backbone's list of layers; default: found by search.
        final_norm (str | None): path of the norm after the last layer, `""` for none; default: found by search.
        exit_projections (bool): whether the state of each exit goes through its own square matrix.
        exit_gates (bool): whether each exit weighs the tokens of a text itself, if its pooling is `mean` or
            `weightedmean`.
        exit_poolings (list[str] | None): the pooling of each exit, if they differ; default: `pooling` for all of them.
        similarity (str): how embeddings are compared, `cosine` or `dot`. For `dot`, embeddings are not normalised.
        kwargs: those of `PreTrainedConfig`.

    Raises:
        ValueError: `pooling` or `similarity` is unknown, `prompts` are not texts, or the backbone does not have one of
            the `sizes`.
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
        exit_gates=False,
        exit_poolings=None,
        similarity="cosine",
        **kwargs,
    ):
        if backbone_config is None:
            backbone_config = AutoConfig.for_model("bert")
        elif isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        for mode in (pooling, *(exit_poolings or ())):
            if mode not in POOLING_MODES:
                raise ValueError(f"pooling: {mode!r} is unknown; choose one of {', '.join(POOLING_MODES)}")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity: {similarity!r} is unknown; choose one of {', '.join(SIMILARITIES)}")
        prompts = {} if prompts is None else prompts
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for pair in prompts.items() for text in pair):
            raise ValueError(f"prompts: {prompts!r} is not allowed; use texts by name")
        self.backbone_config = backbone_config
        self.pooling = pooling
        self.num_layers = num_layers if num_layers is not None else backbone_config.num_hidden_layers
        self.hidden_size = backbone_config.hidden_size
        self.dim = dim if dim is not None else self.hidden_size
        self.prompts = dict(prompts)
        self.default_prompt_name = default_prompt_name
        self.layer_stack = layer_stack
        self.final_norm = final_norm
        self.exit_projections = exit_projections
        self.exit_gates = exit_gates
        self.exit_poolings = exit_poolings
        if exit_poolings is not None and len(exit_poolings) < self.num_layers:
            raise ValueError(f"exit_poolings: there are {len(exit_poolings)} for {self.num_layers} exits")
        self.similarity = similarity
        self.sizes: list[str] | None = None
        # These keys are derived; they are in config.json for other libraries that read them.
        for derived in ("is_matryoshka", "matryoshka_dimensions", "hidden_size", "num_hidden_layers"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)
        self.set_ladder(sizes)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model, under the name that sentence-transformers and vLLM read."""
        return self.num_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        raise ValueError(f"num_hidden_layers: {value} cannot be set; set num_layers, which has 1 to {self.num_layers}")

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings, which resizing them sets, and PEFT compares with those of the folder."""
        return self.backbone_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.backbone_config.vocab_size = value

    def pooling_of(self, num_layers: int) -> str:
        """The pooling of an exit."""
        return self.exit_poolings[num_layers - 1] if self.exit_poolings else self.pooling

    @property
    def prompt_notes(self) -> list[str]:
        """The name and the text of each prompt that is not empty, as a card shows them."""
        default = {self.default_prompt_name: " (the default)"}
        return [f"`{name}`: {text!r}{default.get(name, '')}" for name, text in self.prompts.items() if text]

    @property
    def ladder(self) -> list[Size]:
        """The sizes that the model is trained for, small to large; its full size if none were given."""
        return parse_ladder(self.sizes) if self.sizes else [Size(self.num_layers, self.dim)]

    def set_ladder(self, sizes) -> None:
        """Set the sizes that the model is trained for; None or an empty list for none.

        Raises:
            ValueError: the backbone does not have one of them.
        """
        if not sizes:
            self.sizes = None
            return
        backbone = self.backbone_config
        self.sizes = [str(size) for size in parse_ladder(sizes, backbone.num_hidden_layers, self.hidden_size)]

    def cut_ladder(self, num_layers: int, dim: int) -> None:
        """Drop the sizes that have more than `num_layers` layers or `dim` dimensions."""
        self.set_ladder([s for s in map(parse_size, self.sizes or []) if s.num_layers <= num_layers and s.dim <= dim])

    def with_size(self, num_layers: int | None = None, dim: int | None = None) -> "TwoDMSEConfig":
        """A copy with other `num_layers` and `dim`, unless they are None."""
        config = copy.deepcopy(self)
        config.num_layers = self.num_layers if num_layers is None else num_layers
        config.dim = self.dim if dim is None else dim
        return config

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As `PreTrainedConfig.from_dict`; the size among the arguments may have any of its names.

        Raises:
            ValueError: as `one_size`.
        """
        return super().from_dict(config_dict, **size_fields(kwargs))

    def to_dict(self):
        """The configuration as it is written to JSON, with the keys that other libraries read."""
        output = super().to_dict()
        output["num_hidden_layers"] = self.num_layers
        output["is_matryoshka"] = True
        output["matryoshka_dimensions"] = sorted({size.dim for size in self.ladder})
        return output


TwoDMSEConfig.register_for_auto_class()

__all__ = ["POOLING_MODES", "SIMILARITIES", "Size", "TwoDMSEConfig", "parse_ladder", "parse_size"]
