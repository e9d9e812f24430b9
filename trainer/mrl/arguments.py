"""The arguments of `ClassifierTrainer`."""

from dataclasses import dataclass, field

from ..shared.arguments import BestKeepingTrainingArguments


@dataclass
class ClassifierTrainingArguments(BestKeepingTrainingArguments):
    """Arguments of `ClassifierTrainer`.

    The defaults that differ from `BaseTrainingArguments`: a batch size of 32, warm-up over the first tenth of the
    steps, and the checkpoint with the best mean accuracy over all sizes is kept at the end.
    """

    sizes: list[str] | None = field(
        default=None,
        metadata={"help": "Sizes: dimensions (8 64 384), or LAYERSxDIM for heads on exits (2x64 6x384). Default: the "
                  "model's ladder, or H, H/2, ... 8."},
    )  # fmt: skip
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples per step and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Examples per batch in evaluations."})
    metric_for_best_model: str | None = field(
        default="accuracy_mean", metadata={"help": "Metric that selects the best checkpoint."}
    )
