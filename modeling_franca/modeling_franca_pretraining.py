"""FrancaForPretraining: embeddings that can be truncated, trained by self-distillation over nested clusters."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import torch
from torch import nn
from transformers.utils import ModelOutput

from .clustering import NestedClusteringHead, assignment_loss, koleo_loss, pairwise_assignment_loss, sinkhorn
from .configuration_franca import FrancaConfig
from .file_modes import share_weights
from .images import check_pixels, find_mask_token
from .modeling_franca import FrancaModel, FrancaPreTrainedModel, load_backbone, save_processor


@dataclass
class FrancaPretrainingOutput(ModelOutput):
    """Output of `FrancaForPretraining`. All fields except `loss` are without gradient.

    Args:
        loss: scalar, mean of loss_cls + patch_weight * mean of loss_patch + koleo_weight * koleo.
        loss_cls: (sizes,), cross-entropy of each nesting size on [CLS] tokens.
        loss_patch: (sizes,), cross-entropy of each nesting size on masked patches.
        koleo: scalar, the regulariser; 0 if its weight is 0.
    """

    loss: torch.Tensor | None = None
    loss_cls: torch.Tensor | None = None
    loss_patch: torch.Tensor | None = None
    koleo: torch.Tensor | None = None


class FrancaForPretraining(FrancaPreTrainedModel):
    """Self-distillation over nested clusters (Franca, Venkataramanan et al. 2025, section 3).

    The teacher is an exponential moving average of the student and is never trained. It sees the global crops of an
    image, and for each nesting size Sinkhorn-Knopp assigns them to prototypes. From a global or local crop, the student
    predicts the assignments of the other global crops. From the patches around them, it predicts the assignments of
    masked patches. The loss is the mean over nesting sizes (the released code sums them).

    Args:
        config: the backbone's configuration, the nesting sizes and the heads.

    Raises:
        ValueError: `config` has a folded `RasaProjector`, or `patch_weight` without a mask token.
    """

    def __init__(self, config: FrancaConfig):
        if config.rasa:
            raise ValueError("rasa: position is removed after training; set it to False")
        super().__init__(config)
        self.student, self.teacher = FrancaModel(config), FrancaModel(config)
        self.student_heads, self.teacher_heads = _build_heads(config), _build_heads(config)
        mask_token = find_mask_token(self.student.backbone)
        if config.patch_weight and mask_token is None:
            raise ValueError(
                f"patch_weight: {type(self.student.backbone).__name__} has no mask token (use_mask_token in its "
                "configuration); use patch_weight 0"
            )
        self.post_init()
        if self.device.type != "meta":
            self.copy_to_teacher()
        self._freeze()

    @classmethod
    def from_backbone(
        cls, name_or_path: str | os.PathLike, trust_remote_code: bool = False, **settings
    ) -> "FrancaForPretraining":
        """Start from a pre-trained vision transformer.

        Args:
            name_or_path: folder or Hub name of a Dinov2, DINOv3, ViT, ...
            trust_remote_code: whether code of the folder may be run, for the backbone and the image processor.
            settings: fields of `FrancaConfig`, for example `nesting_sizes`.

        Raises:
            ValueError: it is a Franca model already, or a setting is not allowed.
        """
        backbone, config = load_backbone(name_or_path, settings, trust_remote_code)
        model = cls(config)
        model.student.backbone.load_state_dict(backbone.state_dict())
        model.copy_to_teacher()
        model.teacher._trusts_code = trust_remote_code
        return model

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
        absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        if absent:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights lack {len(absent)} of the tensors of a pre-training "
                f"model, for example {absent[0]}; {cls.__name__}.from_backbone starts from a vision transformer"
            )
        model._freeze()  # loading creates new parameters
        model.teacher._trusts_code = bool(kwargs.get("trust_remote_code"))
        return (model, info) if wants_info else model

    @property
    def image_processor(self):
        """The teacher's image processor."""
        return self.teacher.image_processor

    @image_processor.setter
    def image_processor(self, value):
        self.teacher.image_processor = value

    def train(self, mode: bool = True) -> "FrancaForPretraining":
        """Set the training mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self._teacher_parts().eval()
        return self

    @torch.no_grad()
    def copy_to_teacher(self) -> None:
        """Make the teacher equal to the student."""
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, once per optimizer step."""
        pairs = ((self.teacher, self.student), (self.teacher_heads, self.student_heads))
        for teacher, student in pairs:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.mul_(momentum).add_(new.detach().to(old.dtype), alpha=1 - momentum)
            for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
                buffer.copy_(source)

    def encode(
        self,
        images: Sequence | torch.Tensor,
        dim: int | None = None,
        batch_size: int = 64,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """The teacher's embeddings; arguments as in `FrancaModel.encode`."""
        return self.teacher.encode(images, dim, batch_size, convert_to_tensor)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Save student, teacher and heads, to continue training; `FrancaModel` and AutoModel load the teacher."""
        # In addition to the entry of this class, which transformers adds.
        self.config.auto_map = {"AutoModel": f"modeling_franca.{FrancaModel.__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            share_weights(save_directory)
            save_processor(self.teacher, save_directory)

    def forward(
        self,
        global_crops: torch.Tensor,
        local_crops: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        teacher_temperature: float | None = None,
        masked: torch.Tensor | None = None,
    ) -> FrancaPretrainingOutput:
        """The loss of a batch.

        Args:
            global_crops: (batch, G, channels, height, width), crops that student and teacher see.
            local_crops: (batch, L, channels, height, width), smaller crops that only the student sees.
            mask: (batch, G, patches), True where a global crop's patch is hidden from the student.
            teacher_temperature: of this step; default: the configuration's `teacher_temperature`.
            masked: (hidden patches,), the places in `mask`, flattened, that are True. Found if not given, which waits
                for a GPU.

        Raises:
            ValueError: the size of a crop is not a multiple of the patch size, there is only one crop, or only one
                image with KoLeo.
        """
        self._check(global_crops, local_crops)
        temperature = self.config.teacher_temperature if teacher_temperature is None else teacher_temperature
        shape = global_crops.shape[:2]
        views = global_crops.flatten(0, 1)
        hidden = mask.flatten(0, 1).bool() if mask is not None and self.config.patch_weight else None
        with torch.no_grad():
            target = self.teacher(views)
        seen = self.student(views, hidden)
        crops = [seen.pooler_output.unflatten(0, shape)]
        if local_crops is not None:
            local = self.student(local_crops.flatten(0, 1)).pooler_output
            crops.append(local.unflatten(0, local_crops.shape[:2]))
        loss_cls = self._loss_of_crops(torch.cat(crops, dim=1), target.pooler_output, shape, temperature)
        loss_patch = torch.zeros_like(loss_cls)
        if hidden is not None:
            masked = hidden.flatten().nonzero().squeeze(1) if masked is None else masked
            loss_patch = self._loss_of_patches(seen.patch_tokens, target.patch_tokens, hidden, masked, temperature)
        koleo = loss_cls.new_zeros(())
        if self.config.koleo_weight:
            each = torch.stack([koleo_loss(crop) for crop in crops[0].unbind(1)])
            koleo = each.sum() if self.config.koleo_reduction == "sum" else each.mean()
        loss = loss_cls.mean() + self.config.patch_weight * loss_patch.mean() + self.config.koleo_weight * koleo
        return FrancaPretrainingOutput(loss, loss_cls.detach(), loss_patch.detach(), koleo.detach())

    def _loss_of_crops(
        self, student: torch.Tensor, teacher: torch.Tensor, shape: torch.Size, temperature: float
    ) -> torch.Tensor:
        """Mean over images, the teacher's crops and the student's other crops.

        Args:
            student: (batch, G + L, D), [CLS] tokens.
            teacher: (batch * G, D), [CLS] tokens.
            shape: (batch, G).

        Returns:
            (sizes,).
        """
        # Selecting the other pairs would wait for a GPU, because their number would come from the mask.
        same = torch.eye(shape[1], student.shape[1], dtype=torch.bool, device=student.device)
        losses = []
        scores = self.student_heads["cls"](student.flatten(0, 1))
        with torch.no_grad():
            targets = self.teacher_heads["cls"](teacher)
        for own, target in zip(scores, targets, strict=True):
            assigned = sinkhorn(target, temperature, self.config.sinkhorn_iterations).unflatten(0, shape)
            own = own.unflatten(0, student.shape[:2])
            each = pairwise_assignment_loss(assigned, own, self.config.student_temperature)
            losses.append(each.masked_fill(same, 0.0).sum() / (len(each) * (same.numel() - shape[1])))
        return torch.stack(losses)

    def _loss_of_patches(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        hidden: torch.Tensor,
        masked: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """Mean over crops of the mean over a crop's masked patches; a crop without masked patches counts as 0.

        Args:
            student: (crops, patches, D), patch tokens.
            teacher: (crops, patches, D), patch tokens.
            hidden: (crops, patches), True where a patch is masked.
            masked: (masked patches,), their places in `hidden`, flattened.

        Returns:
            (sizes,).
        """
        share = (hidden / hidden.sum(dim=1, keepdim=True).clamp_min(1)).flatten()[masked] / len(hidden)
        scores = self.student_heads["patch"](student.flatten(0, 1).index_select(0, masked))
        with torch.no_grad():
            targets = self.teacher_heads["patch"](teacher.flatten(0, 1).index_select(0, masked))
        losses = []
        for own, target in zip(scores, targets, strict=True):
            assigned = sinkhorn(target, temperature, self.config.sinkhorn_iterations)
            losses.append((assignment_loss(assigned, own, self.config.student_temperature) * share).sum())
        return torch.stack(losses)

    def _check(self, global_crops: torch.Tensor, local_crops: torch.Tensor | None) -> None:
        check_pixels("global_crops", global_crops, self.config.patch_size)
        if local_crops is not None:
            check_pixels("local_crops", local_crops, self.config.patch_size)
        elif global_crops.shape[1] < 2:
            raise ValueError("global_crops: a single crop has no other crop to predict; give two, or local crops")

    def _freeze(self) -> None:
        """Put the teacher into evaluation mode without gradients, and exclude a mask token that nothing uses."""
        self._teacher_parts().requires_grad_(False).eval()
        mask_token = find_mask_token(self.student.backbone)
        if not self.config.patch_weight and mask_token is not None:
            mask_token.requires_grad_(False)  # DistributedDataParallel waits for every gradient

    def _teacher_parts(self) -> nn.ModuleList:
        return nn.ModuleList([self.teacher, self.teacher_heads])


def _build_heads(config: FrancaConfig) -> nn.ModuleDict:
    """One head for [CLS] tokens, and one for patches if they are trained."""
    names = ["cls", "patch"] if config.patch_weight else ["cls"]
    shape = (config.hidden_size, config.nesting_sizes, config.level_prototypes, config.head_input)
    inner = (config.head_num_layers, config.head_hidden_size, config.head_bottleneck_size)
    return nn.ModuleDict({name: NestedClusteringHead(*shape, *inner, config.head_output) for name in names})


FrancaForPretraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = ["FrancaForPretraining", "FrancaPretrainingOutput"]
