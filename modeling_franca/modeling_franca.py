"""FrancaModel: a vision transformer whose embeddings can be truncated."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_franca import FrancaConfig
from .file_modes import share_weights
from .images import batches, build_backbone, check_pixels, constructor_options, count_prefix_tokens, run_backbone
from .rasa import RasaProjector
from .running import execution_device, inference_twin


@dataclass
class FrancaModelOutput(ModelOutput):
    """Output of `FrancaModel`, after the backbone's final norm.

    Args:
        last_hidden_state: (batch, tokens, D), all tokens of the backbone's output.
        pooler_output: (batch, D), the [CLS] token, neither cut nor normalised.
        patch_tokens: (batch, patches, D), with position removed if a `RasaProjector` is folded in.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    patch_tokens: torch.Tensor | None = None


class FrancaPreTrainedModel(PreTrainedModel):
    """Base class of `FrancaModel` and `FrancaForPretraining`."""

    config: FrancaConfig
    config_class = FrancaConfig
    base_model_prefix = "teacher"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module):
        # DINO's heads start with a standard deviation of 0.02, which is 1/sqrt(inputs) at their width of 2048.
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class FrancaModel(FrancaPreTrainedModel):
    """A vision transformer whose [CLS] embedding can be cut to any of its nesting sizes: normalize(z[:m]).

    From a folder of `FrancaForPretraining`, the teacher is loaded.

    Args:
        config: the backbone's configuration and the nesting sizes.
    """

    backbone: PreTrainedModel
    _keys_to_ignore_on_load_unexpected = [r"^(student|student_heads|teacher_heads)\."]

    def __init__(self, config: FrancaConfig):
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        size = config.hidden_size
        self.rasa = nn.Linear(size, size, bias=False) if config.rasa else None
        self._image_processor = None
        self._trusts_code = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a saved model; `trust_remote_code=True` also holds for its image processor.

        Args:
            pretrained_model_name_or_path: folder or Hub name of a Franca model.
            args: those of `PreTrainedModel.from_pretrained`.
            kwargs: those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the weights do not fill the model.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[Self, dict]", loaded)
        absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        check_filled(absent, pretrained_model_name_or_path)
        model._trusts_code = bool(kwargs.get("trust_remote_code"))
        return (model, info) if wants_info else model

    @classmethod
    def from_backbone(
        cls, name_or_path: str | os.PathLike, trust_remote_code: bool = False, **settings
    ) -> "FrancaModel":
        """Import a pre-trained vision transformer.

        Args:
            name_or_path: folder or Hub name of a Dinov2, DINOv3, ViT, ...
            trust_remote_code: whether code of the folder may be run, for the backbone and the image processor.
            settings: fields of `FrancaConfig`, for example `nesting_sizes`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: it is a Franca model already, or a setting is not allowed.
        """
        backbone, config = load_backbone(name_or_path, settings, trust_remote_code)
        with torch.device("meta"):
            model = cls(config)
        model.backbone = backbone
        model._trusts_code = trust_remote_code
        return model.eval()

    @property
    def image_processor(self):
        """Turns images into pixel values; it comes from the folder of the model, unless another one was set."""
        if self._image_processor is None:
            source = self.config.name_or_path
            if not source:
                raise ValueError("image_processor: this model was not loaded from a folder; set model.image_processor")
            self._image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=self._trusts_code)
        return self._image_processor

    @image_processor.setter
    def image_processor(self, value):
        self._image_processor = value

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> FrancaModelOutput:
        """Run the backbone.

        Args:
            pixel_values: (batch, channels, height, width), height and width multiples of the patch size.
            bool_masked_pos: (batch, patches), True where the mask token replaces a patch.

        Raises:
            ValueError: height or width is not a multiple of the patch size, or the backbone has no [CLS] token or not
                one token per patch.
        """
        check_pixels("pixel_values", pixel_values, self.config.patch_size)
        states = run_backbone(self.backbone, pixel_values, bool_masked_pos)
        patches = states[:, count_prefix_tokens(self.config.backbone_config) :]
        grid = [edge // size for edge, size in zip(pixel_values.shape[-2:], self.config.patch_size, strict=True)]
        if patches.shape[1] not in (0, grid[0] * grid[1]):  # 0: the backbone only encodes whole images
            raise ValueError(
                f"backbone: {type(self.backbone).__name__} gives {states.shape[1]} tokens for {grid[0]}x{grid[1]} "
                "patches; Franca needs a [CLS] token and one token per patch"
            )
        if self.rasa is not None:
            patches = self.rasa(patches)
        return FrancaModelOutput(last_hidden_state=states, pooler_output=states[:, 0], patch_tokens=patches)

    @torch.no_grad()
    def encode(
        self,
        images: Sequence | torch.Tensor,
        dim: int | None = None,
        batch_size: int = 64,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embed images.

        Args:
            images: images that the image processor accepts (PIL images, arrays), or pixel values (n, channels, height,
                width).
            dim: dimensions to keep, 1 to the hidden size; default: all.
            batch_size: images per batch.
            convert_to_tensor: return a tensor on the model's device instead of a numpy array.

        Returns:
            (n, dim) unit vectors in float32; (0, dim) for no images.

        Raises:
            ValueError: `dim` or `batch_size` is not allowed, or the size of the images is not a multiple of the patch
                size.
        """
        size = self.config.hidden_size
        dim = size if dim is None else dim
        if not 1 <= dim <= size:
            raise ValueError(f"dim: {dim} is not allowed; use a whole number from 1 to {size}")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not allowed; use a whole number from 1")
        processor = None if isinstance(images, torch.Tensor) or not len(images) else self.image_processor
        model, device = inference_twin(self), execution_device(self)
        count = -(-len(images) // batch_size)
        work = logging.tqdm(batches(images, batch_size, processor), "encoding", total=count, disable=count < 20)
        parts = [F.normalize(model(pixels.to(device)).pooler_output[:, :dim].float(), dim=-1) for pixels in work]
        found = torch.cat(parts) if parts else torch.zeros((0, dim), device=device)
        return found if convert_to_tensor else found.cpu().numpy()

    def fold(self, projector: RasaProjector) -> "FrancaModel":
        """Remove position from `patch_tokens` from now on, also after saving and loading.

        Args:
            projector: fitted on patch tokens of this model.

        Returns:
            The model itself.

        Raises:
            ValueError: a projector is folded in already, or it is for another number of dimensions.
        """
        if self.config.rasa:
            raise ValueError("projector: this model has one folded in already; fit a projector on the plain model")
        if projector.basis.shape[0] != self.config.hidden_size:
            raise ValueError(
                f"projector: it is for {projector.basis.shape[0]} dimensions, not for the model's "
                f"{self.config.hidden_size}"
            )
        self.rasa = projector.as_linear().to(device=execution_device(self), dtype=self.dtype)
        self.config.rasa = True
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Save the model, its code, and the image processor if there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            share_weights(save_directory)
            save_processor(self, save_directory)

    def save_backbone(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write the backbone as a plain checkpoint of its family, which AutoModel loads without this code."""
        weights = self.backbone.state_dict()
        if "use_mask_token" in constructor_options(self.config.backbone_config):
            weights = {name: value for name, value in weights.items() if not name.endswith("mask_token")}
        self.backbone.save_pretrained(save_directory, state_dict=weights, **kwargs)
        share_weights(save_directory)
        save_processor(self, save_directory)


def load_backbone(
    name_or_path: str | os.PathLike, settings: dict, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, FrancaConfig]:
    """The model of a stock checkpoint, and the configuration of a Franca model around it."""
    name_or_path = str(name_or_path)
    trusted = {"trust_remote_code": trust_remote_code}
    backbone, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **trusted)
    if isinstance(backbone, FrancaPreTrainedModel):
        raise ValueError(f"name_or_path: {name_or_path} is a Franca model already; load it with from_pretrained")
    config = FrancaConfig(backbone_config=backbone.config, dtype=backbone.dtype, **settings)
    options = constructor_options(backbone.config)
    if options:  # rebuilt without the pooling head and with a mask token
        weights, backbone = backbone.state_dict(), build_backbone(backbone.config)
        backbone.load_state_dict({name: weights.get(name, value) for name, value in backbone.state_dict().items()})
    # A pooling head is not used, and a mask token that was not trained may be random.
    used = {name for name, _ in backbone.named_parameters() if not name.endswith("mask_token")}
    check_filled(used & set(info["missing_keys"]), name_or_path)
    if os.path.isdir(name_or_path):
        backbone.config.name_or_path = ""  # a local path means nothing to whoever loads the model
    config.name_or_path = name_or_path
    return backbone, config


def check_filled(absent: Iterable[str], name_or_path: object) -> None:
    """ValueError if `from_pretrained` found no weights for some tensors, which would be random."""
    names = sorted(absent)
    if names:
        raise ValueError(f"{name_or_path}: the weights lack {len(names)} tensors of the model, for example {names[0]}")


def save_processor(model: FrancaModel, folder: str | os.PathLike) -> None:
    """Save the model's image processor to a folder, if it has one."""
    try:
        processor = model.image_processor
    except (OSError, ValueError):
        return  # a model without an image processor can still be saved
    processor.save_pretrained(folder)


FrancaModel.register_for_auto_class("AutoModel")

__all__ = ["FrancaModel", "FrancaModelOutput", "FrancaPreTrainedModel", "load_backbone", "save_processor"]
