"""FrancaTrainer: transformers' Trainer for self-distillation, with the update of the teacher and the schedules."""

import os
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_franca import FrancaForPretraining

from ..shared.callbacks import SetEpoch, StopSignals
from ..shared.checkpoints import CheckpointMixin
from ..shared.mixin import check_model, given_or_default
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin
from .arguments import FrancaTrainingArguments
from .crops import MultiCrop


class UpdateTeacher(TrainerCallback):
    """Moves the teacher towards the student after each optimizer step, not after each accumulated batch."""

    def __init__(self, model: FrancaForPretraining):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        self.model.update_teacher(self.model.config.momentum_at(state.global_step / state.max_steps))


class FrancaTrainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, Trainer):
    """Pre-trains a `FrancaForPretraining` by self-distillation, and updates its teacher after each optimizer step.

    Args:
        model: the model; its image processor sets how images are normalized.
        args: the arguments; without any, the defaults, written to `tmp_trainer`.
        train_dataset: rows with the columns `image` (PIL images) and `index`.
        data_collator: makes batches for the model's `forward`; by default a `MultiCrop` with these arguments.
        **kwargs: passed to `Trainer`.

    Raises:
        ValueError: there are fewer images than a step takes, or a crop size is not a multiple of the patch size.
    """

    args: FrancaTrainingArguments
    model: FrancaForPretraining

    # compute_loss returns the mean of one batch; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: FrancaForPretraining | None = None,
        args: FrancaTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        data_collator: Callable | None = None,
        **kwargs: Any,
    ):
        model, args = check_model(model), given_or_default(args, FrancaTrainingArguments)
        collator = data_collator if data_collator is not None else make_collator(model, args)
        block = args.train_batch_size * args.world_size
        if train_dataset is not None and len(train_dataset) < block:
            raise ValueError(
                f"per_device_train_batch_size: a step takes {block} images, but there are {len(train_dataset)}"
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
                SetEpoch(collator),
                UpdateTeacher(model),
                self.stop_signals,
                *(kwargs.pop("callbacks", None) or []),
            ],
            **kwargs,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # Files have older names for some of Dinov2's weights. from_pretrained knows them; Trainer would skip them.
        if model is not None or not os.path.isfile(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME)):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model at the temperature of this step; the parts of every nesting size are logged."""
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
    """The collator that makes the views of the arguments."""
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
        args.max_mask_ratio,
    )
