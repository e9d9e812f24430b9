"""The configuration of a LLaVA whose number of visual tokens is chosen per request."""

import math

import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # before a name is imported that older versions do not have
    raise ImportError(f"M3 models need transformers 5 or newer, not {transformers.__version__}; upgrade transformers")

from transformers import LlavaConfig

from .visual_tokens import check_token_count, check_token_sizes, nested_token_sizes

POOL_POSITIONS = ("after_projector", "before_projector")


class MatryoshkaLlavaConfig(LlavaConfig):
    """Configuration of a `MatryoshkaLlavaForConditionalGeneration`: a stock LLaVA's fields, and those below.

    Args:
        visual_token_sizes (list[int] | None): the levels that are trained, each the square of a divisor of the grid's
            side and a pooling of the next. Default: the side is divided by its smallest prime factor down to 1, which
            gives 1, 9, 36, 144, 576 for LLaVA-1.5's 24 x 24 grid, as in the paper.
        scale_loss_weights (list[float] | None): weight of each level's loss in the mean; default: equal.
        pool_position (str): `after_projector`, as in the code of the paper's authors, or `before_projector`.
        default_visual_tokens (int | None): visual tokens per image if a call names no number; default: the whole grid,
            as in stock LLaVA.

    Raises:
        ValueError: a value is not allowed; the message names the field.
    """

    model_type = "matryoshka_llava"

    visual_token_sizes: list[int] | None = None
    scale_loss_weights: list[float] | None = None
    pool_position: str = "after_projector"
    default_visual_tokens: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_visual_tokens()

    def check_visual_tokens(self) -> None:
        """Sort the levels and fill in defaults.

        The model calls this again, because `from_pretrained` changes fields of an existing configuration.

        Raises:
            ValueError: a value is not allowed; the message names the field.
        """
        if self.pool_position not in POOL_POSITIONS:
            raise ValueError(
                f"pool_position: {self.pool_position!r} is unknown; choose one of {', '.join(POOL_POSITIONS)}"
            )
        self.set_levels(self.visual_token_sizes, self.scale_loss_weights)
        if self.default_visual_tokens is None:
            self.default_visual_tokens = self.grid_side**2
        check_token_count(self.default_visual_tokens, self.grid_side, "default_visual_tokens")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a configuration; that of a stock LLaVA is read as one of this class."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == LlavaConfig.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @property
    def grid_side(self) -> int:
        """Patches along one side of the image."""
        image, patch = (_side(getattr(self.vision_config, name, None), name) for name in ("image_size", "patch_size"))
        return image // patch

    def set_levels(self, sizes: list[int] | None = None, weights: list[float] | None = None) -> None:
        """Set the levels that are trained and the weights of their losses; ValueError if they do not fit the grid."""
        sizes = nested_token_sizes(self.grid_side) if sizes is None else sizes
        levels = check_token_sizes(sizes, self.grid_side)
        if weights is not None:
            if len(weights) != len(levels):
                raise ValueError(f"scale_loss_weights: there are {len(weights)} for {len(levels)} visual_token_sizes")
            if not all(math.isfinite(weight) and weight > 0 for weight in weights):
                raise ValueError(f"scale_loss_weights: {list(weights)} is not allowed; use numbers above 0")
            by_size = dict(zip(sizes, weights, strict=True))
            weights = [float(by_size[level]) for level in levels]
        self.visual_token_sizes = levels
        self.scale_loss_weights = weights

    @property
    def level_shares(self) -> dict[int, float]:
        """The weight of each level's loss in the mean over levels; the weights sum to 1."""
        sizes = self.visual_token_sizes or []  # check_visual_tokens has set them
        weights = self.scale_loss_weights or [1.0] * len(sizes)
        return {size: w / sum(weights) for size, w in zip(sizes, weights, strict=True)}


def _side(value, name: str) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"vision_config.{name}: {value} is not allowed; visual tokens are pooled on a square grid")
    return sides.pop()


MatryoshkaLlavaConfig.register_for_auto_class()

__all__ = ["POOL_POSITIONS", "MatryoshkaLlavaConfig"]
