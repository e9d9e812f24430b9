"""The arguments of SmaeTrainer."""

from dataclasses import dataclass, field

from ..shared.arguments import ElasticTrainingArguments


@dataclass
class SmaeTrainingArguments(ElasticTrainingArguments):
    """Arguments of [`SmaeTrainer`]. The defaults that differ from transformers' are those of Starbucks' SMAE: learning
    rate 1e-4 on a cosine, weight decay 1e-3, warm-up over the first 0.05, masks 0.2 and 0.4; and as above, bf16 where
    the CPU has it, unused columns kept, checkpoints and evaluations at each quarter."""

    mlm_probability: float = field(default=0.2, metadata={"help": "Share of words masked for the encoder."})
    decoder_mlm_probability: float = field(default=0.4, metadata={"help": "Share of words masked for the decoder."})
    max_length: int = field(
        default=128, metadata={"help": "Longest text in tokens; longer ones are cropped at random."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts a step and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts a batch of the evaluation."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    weight_decay: float = field(default=1e-3, metadata={"help": "Weight decay."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Optimizer steps of warm-up; below 1, a share of all steps."}
    )

    def __post_init__(self):
        low, high = self.mlm_probability, self.decoder_mlm_probability
        faults = [
            f"{name}: {value} is not allowed; use a share between 0 and 1"
            for name, value in (("mlm_probability", low), ("decoder_mlm_probability", high))
            if not 0 < value < 1
        ]
        if not faults and low > high:
            faults = [f"mlm_probability: {low} is above decoder_mlm_probability ({high}), whose words contain its own"]
        if self.max_length < 8:
            faults.append(f"max_length: {self.max_length} is not allowed; use a number of at least 8")
        if faults:
            raise ValueError("; ".join(faults))
        super().__post_init__()
