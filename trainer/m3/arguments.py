"""The arguments of `M3Trainer`."""

from dataclasses import dataclass, field

from ..shared.arguments import BaseTrainingArguments
from ..shared.limits import WEIGHT


@dataclass
class M3TrainingArguments(BaseTrainingArguments):
    """Arguments of `M3Trainer`.

    The defaults that differ from `BaseTrainingArguments` are those of LLaVA-1.5's tuning: a learning rate of 2e-5 with
    a cosine schedule, and warm-up over the first 3 % of the steps.

    Raises:
        ValueError: `max_length` or a weight is not allowed.
    """

    visual_token_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Visual tokens per image at each level, for example 1 9 36. Default: the levels of the model."
        },
    )
    scale_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each level in the loss. Default: equal."}
    )
    freeze_vision_tower: bool = field(
        default=False, metadata={"help": "Train only the projector and the language model."}
    )
    max_length: int = field(
        default=2048,
        metadata={"help": "Maximum length of a text in tokens, an image counted as one; longer texts are cut."},
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up in optimizer steps; below 1, a fraction of all steps."}
    )

    def __post_init__(self):
        if self.max_length < 8:
            raise ValueError(f"max_length: {self.max_length} is not allowed; use a number of at least 8")
        problems = [
            f"scale_loss_weights: {weight} is not allowed; use {WEIGHT}"
            for weight in self.scale_loss_weights or []
            if weight not in WEIGHT
        ]
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__()
