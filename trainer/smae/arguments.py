"""The arguments of `SmaeTrainer`."""

from dataclasses import dataclass, field

from ..shared.arguments import ElasticTrainingArguments


@dataclass
class SmaeTrainingArguments(ElasticTrainingArguments):
    """Arguments of `SmaeTrainer`.

    The defaults that differ from `BaseTrainingArguments` are those of Starbucks' SMAE pre-training: a learning rate of
    1e-4 with a cosine schedule, weight decay 1e-3, warm-up over the first 5 % of the steps, and mask rates 0.2
    (encoder) and 0.4 (decoder).
    """

    mlm_probability: float = field(default=0.2, metadata={"help": "Fraction of words masked for the encoder."})
    decoder_mlm_probability: float = field(default=0.4, metadata={"help": "Fraction of words masked for the decoder."})
    max_length: int = field(
        default=128, metadata={"help": "Maximum length of a text in tokens; longer texts are cropped at random."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts per step and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts per batch in evaluations."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    weight_decay: float = field(default=1e-3, metadata={"help": "Weight decay."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up in optimizer steps; below 1, a fraction of all steps."}
    )

    def __post_init__(self):
        low, high = self.mlm_probability, self.decoder_mlm_probability
        problems = [
            f"{name}: {value} is not allowed; use a number between 0 and 1"
            for name, value in (("mlm_probability", low), ("decoder_mlm_probability", high))
            if not 0 < value < 1
        ]
        if not problems and low > high:
            problems = [
                f"mlm_probability: {low} is above decoder_mlm_probability ({high}), which masks the same words and more"
            ]
        if self.max_length < 8:
            problems.append(f"max_length: {self.max_length} is not allowed; use a number of at least 8")
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__()
