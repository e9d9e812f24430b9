"""The configuration of a nested classifier, and the notation for its sizes."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # before a name is imported that older versions do not have
    raise ImportError(f"MRL models need transformers 5 or newer, not {transformers.__version__}; upgrade transformers")

from transformers import AutoConfig, PreTrainedConfig

HEAD_TYPES = ("separate", "tied")
REDUCTIONS = ("sum", "mean")
TEXT_POOLING = ("mean", "cls", "lasttoken", "weightedmean")
IMAGE_POOLING = ("mean", "cls", "pooler")
# With fewer dimensions the paper finds little information (MRL, section 3).
_SMALLEST_DEFAULT = 8


class Size(NamedTuple):
    """A size of the classifier: `64`, the first 64 dimensions after the whole backbone, or `6x64`, after 6 layers.

    Attributes:
        num_layers: layers to run, None for the whole backbone.
        dim: dimensions to use, from 1.
    """

    num_layers: int | None
    dim: int

    def __str__(self) -> str:
        return str(self.dim) if self.num_layers is None else f"{self.num_layers}x{self.dim}"


def parse_size(text: str | int | Size, argument: str = "sizes") -> Size:
    """Read one size.

    Args:
        text: a number of dimensions, or layers and dimensions as text.
        argument: named in the error message.

    Raises:
        ValueError: the text is not a size.

    >>> parse_size(64), parse_size("6x64")
    (Size(num_layers=None, dim=64), Size(num_layers=6, dim=64))
    """
    if isinstance(text, Size):
        text = str(text)
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", str(text).strip())
    if not match:
        raise ValueError(
            f"{argument}: {str(text)!r} is not a size; write a number of dimensions from 1, for example 64, or "
            "LAYERSxDIM, for example 6x64"
        )
    return Size(int(match[1]) if match[1] else None, int(match[2]))


def halved_sizes(hidden_size: int) -> list[int]:
    """The paper's nested sizes: the hidden size, halved as long as the result is a whole number of at least 8.

    >>> halved_sizes(384)
    [12, 24, 48, 96, 192, 384]
    """
    sizes = [hidden_size]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= _SMALLEST_DEFAULT:
        sizes.insert(0, sizes[0] // 2)
    return sizes


class MatryoshkaConfig(PreTrainedConfig):
    """Configuration of a `MatryoshkaForSequenceClassification` or `MatryoshkaForImageClassification`.

    Args:
        backbone_config (PreTrainedConfig | dict | None): configuration of the encoder inside; default: BERT.
        sizes (list[int] | list[str] | None): the nested sizes: dimensions (`[8, 64, 384]`) or, with heads at several
            exits, layers by dimensions (`["2x64", "6x384"]`). Beside sizes with layers, a plain number means all
            layers. Default: the hidden size halved down to 8.
        head_type (str): `separate` (MRL: one Linear(m, classes) per size m) or `tied` (MRL-E: one
            Linear(largest m, classes) per exit, of which a size uses the first m columns and the whole bias).
        pooling (str): text: `mean`, `cls`, `lasttoken`, `weightedmean`; images: `mean` (over tokens, or over height
            and width), `cls` (first token), `pooler` (the backbone's own `pooler_output`).
        size (int | str | None): the size whose logits are `logits`; default: the largest.
        loss_weights (list[float] | None): c_m of each size (MRL, equation 1); default: 1.
        loss_reduction (str): `sum`, sum_m c_m loss_m, as in the paper, or `mean`, the same divided by the number of
            sizes.
        label_smoothing (float): of the cross-entropy, from 0 to below 1.
        thresholds (list[float] | None): confidence above which a cascade stops, one for each size but the largest;
            chosen by `fit_cascade`.
        layer_stack (str | None): path of the backbone's list of layers; only used with heads at several exits.
            Default: found by search.
        final_norm (str | None): path of the norm after the last layer, `""` for none; only used with heads at several
            exits. Default: found by search.
        kwargs: those of `PreTrainedConfig`.

    Raises:
        ValueError: a value is not allowed; the message names the field.
    """

    model_type = "mrl"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["losses", "logits_by_row"]

    def __init__(
        self,
        backbone_config=None,
        sizes=None,
        head_type="separate",
        pooling="mean",
        size=None,
        loss_weights=None,
        loss_reduction="sum",
        label_smoothing=0.0,
        thresholds=None,
        layer_stack=None,
        final_norm=None,
        **kwargs,
    ):
        if backbone_config is None:
            backbone_config = AutoConfig.for_model("bert")
        elif isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.head_type = head_type
        self.pooling = pooling
        self.size = size
        self.loss_weights = loss_weights
        self.loss_reduction = loss_reduction
        self.label_smoothing = label_smoothing
        self.thresholds = thresholds
        self.layer_stack = layer_stack
        self.final_norm = final_norm
        self.set_sizes(halved_sizes(self.hidden_size) if sizes is None else sizes)
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)
        self.check()

    @property
    def hidden_size(self) -> int:
        """Dimensions of the pooled state, the D of the paper."""
        backbone = self.backbone_config
        width = getattr(backbone, "hidden_size", None) or (getattr(backbone, "hidden_sizes", None) or [None])[-1]
        if width is None:
            raise ValueError(f"backbone_config: {backbone.model_type} names neither hidden_size nor hidden_sizes")
        return width

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings, which resizing them sets, and PEFT compares with those of the folder."""
        return self.backbone_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.backbone_config.vocab_size = value

    @property
    def ladder(self) -> list[Size]:
        """The nested sizes, small to large."""
        return [parse_size(size) for size in self.sizes]

    @property
    def exits(self) -> list[int]:
        """Numbers of layers after which there are heads, ascending; empty if the sizes name no layers."""
        return sorted({size.num_layers for size in self.ladder if size.num_layers is not None})

    def dims_of(self, num_layers: int | None) -> list[int]:
        """Dimensions of the sizes at an exit, small to large."""
        return [size.dim for size in self.ladder if size.num_layers == num_layers]

    def set_sizes(self, sizes) -> None:
        """Set the nested sizes, which are sorted from small to large.

        `loss_weights`, if there is one per size in the order given here, are sorted with them.

        Raises:
            ValueError: there are no sizes, one appears twice, or the backbone does not have one of them.
        """
        if isinstance(sizes, (str, int)):
            raise ValueError(f"sizes: {sizes!r} is not a list; name the sizes as a list, for example [8, 64]")
        ladder = [parse_size(size) for size in sizes]
        if not ladder:
            raise ValueError("sizes: the list is empty; name at least one size, for example 64")
        depth = self._depth() if any(size.num_layers for size in ladder) else None
        if depth is not None:
            ladder = [Size(size.num_layers or depth, size.dim) for size in ladder]
        twice = sorted({str(size) for size in ladder if ladder.count(size) > 1})
        if twice:
            raise ValueError(f"sizes: {', '.join(twice)} appears more than once; name each size once")
        for size in ladder:
            if size.dim > self.hidden_size:
                raise ValueError(
                    f"sizes: {size} asks for {size.dim} dimensions; the backbone has 1 to {self.hidden_size}"
                )
            if size.num_layers is not None and size.num_layers > self._depth():
                raise ValueError(
                    f"sizes: {size} asks for {size.num_layers} layers; the backbone has 1 to {self._depth()}"
                )
        order = sorted(range(len(ladder)), key=ladder.__getitem__)
        self.sizes = [str(ladder[index]) for index in order]
        if isinstance(self.loss_weights, Sequence) and len(self.loss_weights) == len(order):
            self.loss_weights = [self.loss_weights[index] for index in order]

    def find_size(self, size=None) -> Size:
        """The size that `size` names; default: the configuration's own `size`, else the largest.

        Raises:
            ValueError: no head is trained for this size.
        """
        size = self.size if size is None else size
        if size is None:
            return self.ladder[-1]
        wanted = parse_size(size, "size")
        if self.exits and wanted.num_layers is None:
            wanted = Size(self._depth(), wanted.dim)
        dims = self.dims_of(wanted.num_layers)
        if not dims:
            raise ValueError(f"size: {size} is not at an exit with a head; the sizes are {', '.join(self.sizes)}")
        if self.head_type == "separate" and wanted.dim not in dims:
            raise ValueError(
                f"size: {size} has no head, and with head_type separate it cannot use another size's head; the sizes "
                f"are {', '.join(self.sizes)}"
            )
        if wanted.dim > dims[-1]:
            raise ValueError(f"size: {size} asks for {wanted.dim} dimensions; the head has 1 to {dims[-1]}")
        return wanted

    def check(self) -> None:
        """ValueError that names the first field whose value is not allowed."""
        for name, allowed in (
            ("head_type", HEAD_TYPES),
            ("loss_reduction", REDUCTIONS),
            ("pooling", tuple(dict.fromkeys((*TEXT_POOLING, *IMAGE_POOLING)))),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(allowed)}")
        if not _is_number(self.label_smoothing) or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: {self.label_smoothing!r} is not allowed; use a number from 0 to below 1"
            )
        if cast(int, self.num_labels) < 2:
            raise ValueError(f"num_labels: {self.num_labels} is not allowed; a classifier needs at least 2 classes")
        if self.loss_weights is not None:
            _check_numbers("loss_weights", self.loss_weights, len(self.sizes), "one per size")
            if min(self.loss_weights) < 0 or not any(self.loss_weights):
                raise ValueError(f"loss_weights: {self.loss_weights} must have no negative numbers and not only zeros")
        if self.thresholds is not None:
            _check_numbers("thresholds", self.thresholds, len(self.sizes) - 1, "one for each size but the largest")
        self.find_size()

    def _depth(self) -> int:
        depth = getattr(self.backbone_config, "num_hidden_layers", None)
        if depth is None:
            raise ValueError(
                f"sizes: the configuration of {self.backbone_config.model_type} has no number of layers; name only "
                "dimensions"
            )
        return depth


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(name: str, values, length: int, meaning: str) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != length:
        raise ValueError(f"{name}: {values!r} must be a list of {length} numbers, {meaning}")
    if not all(map(_is_number, values)):
        raise ValueError(f"{name}: {values!r} must have only finite numbers")


MatryoshkaConfig.register_for_auto_class()

__all__ = [
    "HEAD_TYPES",
    "IMAGE_POOLING",
    "REDUCTIONS",
    "TEXT_POOLING",
    "MatryoshkaConfig",
    "Size",
    "halved_sizes",
    "parse_size",
]
