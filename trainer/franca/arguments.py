"""The arguments of `FrancaTrainer`."""

from dataclasses import dataclass, field

from ..shared.arguments import BaseTrainingArguments
from ..shared.limits import COUNT, find_problems


@dataclass
class FrancaTrainingArguments(BaseTrainingArguments):
    """Arguments of `FrancaTrainer`.

    The defaults that differ from `BaseTrainingArguments` are those of DINOv2 and Franca: AdamW with a learning rate of
    1e-3 and a cosine schedule, weight decay 0.04, gradients clipped at 3, and warm-up over the first tenth of the
    steps. Batches that are not full are dropped, and there are no evaluations during a run.

    Raises:
        ValueError: values that are not allowed; the message names all of them.
    """

    global_crops_number: int = field(default=2, metadata={"help": "Large crops per image, for teacher and student."})
    local_crops_number: int = field(default=8, metadata={"help": "Small crops per image, for the student only."})
    global_crop_size: int = field(default=224, metadata={"help": "Edge of a large crop in pixels."})
    local_crop_size: int = field(default=96, metadata={"help": "Edge of a small crop in pixels."})
    global_crop_scale: list[float] = field(
        default_factory=lambda: [0.32, 1.0],
        metadata={"help": "Lowest and highest fraction of the image's area in a large crop."},
    )
    local_crop_scale: list[float] = field(
        default_factory=lambda: [0.05, 0.32],
        metadata={"help": "Lowest and highest fraction of the image's area in a small crop."},
    )
    mask_ratio: float = field(default=0.5, metadata={"help": "Fraction of patches hidden in a masked crop."})
    max_mask_ratio: float | None = field(
        default=None,
        metadata={"help": "Draw each masked crop's fraction between mask_ratio and this; the released code draws from "
                  "0.1 to 0.65. Default: always mask_ratio."},
    )  # fmt: skip
    mask_probability: float = field(default=0.5, metadata={"help": "Fraction of large crops that are masked."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    weight_decay: float = field(default=0.04, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=3.0, metadata={"help": "Maximum norm of the gradient."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up in optimizer steps; below 1, a fraction of all steps."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop a last batch that is not full: processes need the same number of images."}
    )
    eval_strategy: str = field(default="no", metadata={"help": "Leave at no: evaluate_franca.py evaluates the model."})

    def __post_init__(self):
        fractions = [("mask_probability", [self.mask_probability]), ("global_crop_scale", self.global_crop_scale)]
        fractions.append(("local_crop_scale", self.local_crop_scale))
        problems = [
            f"{name}: {values} is not allowed; use numbers from 0 to 1, the lowest first"
            for name, values in fractions
            if sorted(values) != list(values) or not all(0 <= value <= 1 for value in values)
        ]
        for name in ("global_crop_scale", "local_crop_scale"):
            if len(getattr(self, name)) != 2:
                problems.append(f"{name}: {getattr(self, name)} is not allowed; give two numbers")
        if not 0 <= self.mask_ratio < 1:
            problems.append(f"mask_ratio: {self.mask_ratio} is not allowed; use a number from 0 to below 1")
        if self.max_mask_ratio is not None and not self.mask_ratio <= self.max_mask_ratio < 1:
            problems.append(
                f"max_mask_ratio: {self.max_mask_ratio} is not allowed; use a number from mask_ratio "
                f"({self.mask_ratio}) to below 1"
            )
        if self.global_crops_number < 1 or self.local_crops_number < 0:
            problems.append("global_crops_number: use at least 1; local_crops_number: use at least 0")
        elif self.global_crops_number + self.local_crops_number < 2:
            problems.append("global_crops_number: 1 crop has no other crop to predict; use 2, or local crops")
        problems += find_problems(self, {"global_crop_size": COUNT, "local_crop_size": COUNT})
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__()
