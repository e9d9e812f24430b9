"""FrancaForPretraining: embeddings that may be cut, trained by self-distillation over nested clusters."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .clustering import NestedClusteringHead, assignment_loss, koleo_loss, pairwise_assignment_loss, sinkhorn
from .configuration_franca import FrancaConfig
from .images import check_pixels, find_mask_token
from .modeling_franca import FrancaModel, FrancaPreTrainedModel, load_backbone, save_processor


@dataclass
class FrancaPretrainingOutput(ModelOutput):
    """
    Output of [`FrancaForPretraining`]. All but `loss` are without gradient.

    Args:
        loss (`torch.Tensor`, scalar): mean of loss_cls + patch_weight * mean of loss_patch + koleo_weight * koleo.
        loss_cls, loss_patch (`torch.Tensor`, (sizes,)): cross-entropies of each nesting size.
        koleo (`torch.Tensor`, scalar): the regulariser; 0 where its weight is.
    """

    loss: torch.Tensor | None = None
    loss_cls: torch.Tensor | None = None
    loss_patch: torch.Tensor | None = None
    koleo: torch.Tensor | None = None


class FrancaForPretraining(FrancaPreTrainedModel):
    """
    Self-distillation over nested clusters (Franca, Venkataramanan et al. 2025, section 3).

    The teacher, an exponential moving average of the student that never trains, sees the global crops of a picture, and
    for each nesting size Sinkhorn-Knopp assigns them to prototypes. The student predicts the assignments of each other
    global crop from its own, from the local crops, and those of masked patches from the patches around them. The loss
    is the mean over nesting sizes (the released code sums them).
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
    def from_backbone(cls, name_or_path, **settings) -> "FrancaForPretraining":
        """Start from a pre-trained vision transformer; `settings` are those of [`FrancaConfig`]."""
        backbone, config = load_backbone(name_or_path, settings)
        model = cls(config)
        model.student.backbone.load_state_dict(backbone.state_dict())
        model.copy_to_teacher()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a saved pre-training model; ValueError where its weights are not all there."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        if absent:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights lack {len(absent)} of the tensors of a pre-training "
                f"model, {absent[0]} among them; {cls.__name__}.from_backbone starts from a vision transformer"
            )
        model._freeze()  # loading makes parameters anew
        return (model, info) if wants_info else model

    @property
    def image_processor(self):
        """The teacher's."""
        return self.teacher.image_processor

    @image_processor.setter
    def image_processor(self, value):
        self.teacher.image_processor = value

    def train(self, mode: bool = True) -> "FrancaForPretraining":
        """As for any module, but the teacher always evaluates."""
        super().train(mode)
        self._teacher_parts().eval()
        return self

    @torch.no_grad()
    def copy_to_teacher(self) -> None:
        """Make the teacher equal to the student."""
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, once for each step of the optimizer."""
        pairs = ((self.teacher, self.student), (self.teacher_heads, self.student_heads))
        for teacher, student in pairs:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.mul_(momentum).add_(new.detach().to(old.dtype), alpha=1 - momentum)
            for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
                old.copy_(new)

    def encode(self, images, dim=None, batch_size=64, convert_to_tensor=False):
        """The teacher's embeddings, as [`FrancaModel.encode`]."""
        return self.teacher.encode(images, dim, batch_size, convert_to_tensor)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save student, teacher and heads, to go on with; `FrancaModel` and AutoModel load the teacher from it."""
        self.config.auto_map = {"AutoModel": f"modeling_franca.{FrancaModel.__name__}"}  # beside the class's own entry
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_processor(self.teacher, save_directory)

    def forward(
        self,
        global_crops: torch.Tensor,
        local_crops: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        teacher_temperature: float | None = None,
    ) -> FrancaPretrainingOutput:
        """
        The loss of a batch.

        Args:
            global_crops: (batch, G, channels, height, width) views that both see.
            local_crops: (batch, L, channels, height, width) smaller views that the student sees.
            mask: (batch, G, patches), True where a global crop's patch is hidden from the student.
            teacher_temperature: of this step; the configuration's final one when left out.

        Raises:
            ValueError: crops that the patches do not divide, one crop alone, one picture alone with KoLeo.
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
            loss_patch = self._loss_of_patches(seen.patch_tokens, target.patch_tokens, hidden, temperature)
        koleo = loss_cls.new_zeros(())
        if self.config.koleo_weight:
            koleo = torch.stack([koleo_loss(crop) for crop in crops[0].unbind(1)]).mean()
        loss = loss_cls.mean() + self.config.patch_weight * loss_patch.mean() + self.config.koleo_weight * koleo
        return FrancaPretrainingOutput(loss, loss_cls.detach(), loss_patch.detach(), koleo.detach())

    def _loss_of_crops(self, student, teacher, shape, temperature: float) -> torch.Tensor:
        """(sizes,) mean over pictures, teacher's crops and the student's other crops.

        Args:
            student: (batch, G + L, D) [CLS] tokens; `teacher`: (batch * G, D); `shape`: (batch, G).
        """
        pairs = torch.ones((shape[1], student.shape[1]), dtype=torch.bool, device=student.device)
        pairs.fill_diagonal_(False)
        losses = []
        scores = self.student_heads["cls"](student.flatten(0, 1))
        with torch.no_grad():
            targets = self.teacher_heads["cls"](teacher)
        for own, target in zip(scores, targets, strict=True):
            assigned = sinkhorn(target, temperature, self.config.sinkhorn_iterations).unflatten(0, shape)
            own = own.unflatten(0, student.shape[:2])
            each = pairwise_assignment_loss(assigned, own, self.config.student_temperature)
            losses.append(each[:, pairs].mean())
        return torch.stack(losses)

    def _loss_of_patches(self, student, teacher, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """(sizes,) mean over crops, those without a masked patch counting 0, of the mean over a crop's masked patches.

        Args:
            student, teacher: (crops, patches, D) tokens; `hidden`: (crops, patches).
        """
        share = (hidden / hidden.sum(dim=1, keepdim=True).clamp_min(1))[hidden] / len(hidden)
        scores = self.student_heads["patch"](student[hidden])
        with torch.no_grad():
            targets = self.teacher_heads["patch"](teacher[hidden])
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
            raise ValueError("global_crops: one crop alone has no other to predict; give two, or local crops")

    def _freeze(self) -> None:
        """The teacher evaluates and has no gradient, nor has a mask token that nothing uses."""
        self._teacher_parts().requires_grad_(False).eval()
        mask_token = find_mask_token(self.student.backbone)
        if not self.config.patch_weight and mask_token is not None:
            mask_token.requires_grad_(False)  # DistributedDataParallel waits for every gradient

    def _teacher_parts(self) -> nn.ModuleList:
        return nn.ModuleList([self.teacher, self.teacher_heads])


def _build_heads(config: FrancaConfig) -> nn.ModuleDict:
    """One for [CLS] tokens, and one for patches where they are trained."""
    names = ["cls", "patch"] if config.patch_weight else ["cls"]
    shape = (config.hidden_size, config.nesting_sizes, config.level_prototypes, config.head_input)
    inner = (config.head_num_layers, config.head_hidden_size, config.head_bottleneck_size)
    return nn.ModuleDict({name: NestedClusteringHead(*shape, *inner) for name in names})


FrancaForPretraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = ["FrancaForPretraining", "FrancaPretrainingOutput"]
