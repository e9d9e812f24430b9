"""FrancaTrainer: transformers' Trainer for self-distillation, with the teacher's update and the schedules."""

import os
from dataclasses import dataclass, field

from transformers import Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_franca import FrancaForPretraining

from ..shared.arguments import BaseTrainingArguments
from ..shared.callbacks import StopSignals, TellEpoch
from ..shared.checkpoints import CheckpointMixin
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin
from .crops import MultiCrop


@dataclass
class FrancaTrainingArguments(BaseTrainingArguments):
    """Arguments of [`FrancaTrainer`].

    The defaults that differ from transformers' are DINOv2's and Franca's: AdamW at 1e-3 on a cosine, weight decay 0.04,
    gradients clipped at 3, warm-up over the first tenth. Batches that are not full are dropped. The rest is what all
    trainings here share: bf16 where the CPU has it, columns that the collator reads, checkpoints at each quarter.
    """

    global_crops_number: int = field(default=2, metadata={"help": "Large views of a picture, that both networks see."})
    local_crops_number: int = field(default=8, metadata={"help": "Small views, that the student sees alone."})
    global_crop_size: int = field(default=224, metadata={"help": "Edge of a large view in pixels."})
    local_crop_size: int = field(default=96, metadata={"help": "Edge of a small view in pixels."})
    global_crop_scale: list[float] = field(
        default_factory=lambda: [0.32, 1.0],
        metadata={"help": "Lowest and highest share of the picture in a large view."},
    )
    local_crop_scale: list[float] = field(
        default_factory=lambda: [0.05, 0.32],
        metadata={"help": "Lowest and highest share of the picture in a small view."},
    )
    mask_ratio: float = field(default=0.5, metadata={"help": "Share of the patches that is hidden in a masked view."})
    mask_probability: float = field(default=0.5, metadata={"help": "Share of the large views that is masked."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pictures a step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    weight_decay: float = field(default=0.04, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=3.0, metadata={"help": "Longest gradient."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Optimizer steps of warm-up; below 1, a share of all steps."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop a last batch that is not full: processes must have as many pictures."}
    )
    eval_strategy: str = field(default="no", metadata={"help": "Kept off: evaluate_franca.py measures what is saved."})

    def __post_init__(self):
        shares = [("mask_probability", [self.mask_probability]), ("global_crop_scale", self.global_crop_scale)]
        shares.append(("local_crop_scale", self.local_crop_scale))
        faults = [
            f"{name}: {values} is not allowed; use shares from 0 to 1, the lowest first"
            for name, values in shares
            if sorted(values) != list(values) or values[0] < 0 or values[-1] > 1
        ]
        for name in ("global_crop_scale", "local_crop_scale"):
            if len(getattr(self, name)) != 2:
                faults.append(f"{name}: {getattr(self, name)} is not allowed; give two shares")
        if not 0 <= self.mask_ratio < 1:
            faults.append(f"mask_ratio: {self.mask_ratio} is not allowed; use a share from 0 to below 1")
        if self.global_crops_number < 1 or self.local_crops_number < 0:
            faults.append("global_crops_number: use at least 1, and local_crops_number of at least 0")
        elif self.global_crops_number + self.local_crops_number < 2:
            faults.append("global_crops_number: 1 view alone has no other to predict; use 2, or local crops")
        if faults:
            raise ValueError("; ".join(faults))
        super().__post_init__()


class UpdateTeacher(TrainerCallback):
    """Moves the teacher towards the student after each step of the optimizer, not after each accumulated batch."""

    def __init__(self, model: FrancaForPretraining):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        self.model.update_teacher(self.model.config.momentum_at(state.global_step / state.max_steps))


class FrancaTrainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, Trainer):
    """
    Pre-trains a [`FrancaForPretraining`].

    Args:
        model: the model; its image processor says how pictures are normalised.
        args: [`FrancaTrainingArguments`].
        train_dataset: rows with the columns `image` (PIL pictures) and `index`.
        data_collator: gives what the model's `forward` takes; [`MultiCrop`] when left out.
        kwargs: passed to `Trainer`.

    Raises:
        ValueError: fewer pictures than a step takes, or crops that the patches do not divide.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: FrancaForPretraining,
        args: FrancaTrainingArguments,
        train_dataset=None,
        data_collator=None,
        **kwargs,
    ):
        collator = data_collator if data_collator is not None else make_collator(model, args)
        block = args.train_batch_size * args.world_size
        if train_dataset is not None and len(train_dataset) < block:
            raise ValueError(
                f"per_device_train_batch_size: a step takes {block} pictures, but there are {len(train_dataset)}"
            )
        if model.config.koleo_weight and block < 2:
            raise ValueError(
                "koleo_weight: a batch of 1 has no nearest neighbour; raise per_device_train_batch_size, or set it to 0"
            )
        self.stop_signals = StopSignals()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=collator,
            callbacks=[
                TellEpoch(collator),
                UpdateTeacher(model),
                self.stop_signals,
                *(kwargs.pop("callbacks", None) or []),
            ],
            **kwargs,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # A file has older names for some of Dinov2's weights, which from_pretrained knows and Trainer would leave out.
        if model is not None or not os.path.isfile(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME)):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss at this step's temperature; the parts of every nesting size are logged."""
        config = self.model.config
        temperature = config.teacher_temperature_at(self.state.global_step / max(1, self.state.max_steps))
        output = model(**inputs, teacher_temperature=temperature)
        names = ["loss_cls", "loss_patch"] if config.patch_weight else ["loss_cls"]
        parts = {
            f"{name}/{size}": value
            for name in names
            for size, value in zip(config.nesting_sizes, output[name], strict=True)
        }
        self.record(output.loss.detach(), parts | {"koleo": output.koleo})
        return (output.loss, output) if return_outputs else output.loss


def make_collator(model: FrancaForPretraining, args: FrancaTrainingArguments) -> MultiCrop:
    """The views that the arguments ask for."""
    processor = model.image_processor
    return MultiCrop(
        model.config.patch_size,
        processor.image_mean,
        processor.image_std,
        args.global_crops_number,
        args.local_crops_number,
        args.global_crop_size,
        args.local_crop_size,
        args.global_crop_scale,
        args.local_crop_scale,
        args.mask_ratio,
        args.mask_probability if model.config.patch_weight else 0.0,
        args.seed,
    )
