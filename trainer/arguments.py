"""What the arguments of all trainers share; TwoDMSETrainingArguments and SmaeTrainingArguments.

TwoDMSETrainingArguments' defaults that differ from transformers': batch size 64 (in-batch negatives need company),
warm-up over the first tenth, unused columns kept (the collator reads the text columns), evaluation and checkpoints at
each quarter of the run with the best checkpoint (by the ladder's mean) kept in the end, and bf16 switched on where a
CPU has instructions for it or `accelerate launch` asks for it.
"""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available, logging

from .losses import LOSSES, SCALE
from .objectives import ALIGNMENTS, OBJECTIVES, TEACHERS
from .sampling import BATCH_SAMPLERS, MIXINGS

logger = logging.get_logger(__name__)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@dataclass
class HouseTrainingArguments(TrainingArguments):
    """What all kinds of training share: transformers' TrainingArguments with other defaults."""

    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bf16 mixed precision. Default: what `accelerate launch` is told; else on where the CPU has AMX "
            "or AVX512-BF16, off elsewhere."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: the collator reads the columns."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept off: a loss that is not finite stops the run."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float | None = field(
        default=0.25, metadata={"help": "Optimizer steps between evaluations; below 1, a share of all steps."}
    )
    save_steps: float = field(
        default=0.25, metadata={"help": "Optimizer steps between checkpoints; below 1, a share of all steps."}
    )

    def __post_init__(self):
        on_cpu = self.use_cpu or not (torch.accelerator.is_available() or is_torch_xla_available())
        if self.bf16 is None:
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by accelerate launch, which asks for it
            chosen = launched == "no" and on_cpu and cpu_has_bf16()
            self.bf16 = not self.fp16 and (chosen or launched == "bf16")
            if chosen and self.bf16:
                logger.warning("bf16 is on: this CPU has instructions for it (--bf16 false switches it off)")
        # Without it transformers refuses bf16 where there is no GPU, even if only the CPU is left to train on.
        self.use_cpu = self.use_cpu or (on_cpu and self.bf16)
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most 1, which keeps Trainer from `DataParallel`: it would cut a step's inputs apart."""
        if super().n_gpu > 1:
            logger.warning_once("using one GPU; start with `accelerate launch` to use them all")
        return min(1, super().n_gpu)


@dataclass
class ElasticTrainingArguments(HouseTrainingArguments):
    """What trainings of a ladder of sizes share."""

    sizes: list[str] | None = field(
        default=None, metadata={"help": "The ladder, as LAYERSxDIM, for example 1x32 2x64 6x384."}
    )


@dataclass
class BestKeepingTrainingArguments(ElasticTrainingArguments):
    """What trainings share that keep the checkpoint with the best score."""

    warmup_steps: float = field(
        default=0.1, metadata={"help": "Optimizer steps of warm-up; below 1, a share of all steps."}
    )
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the best checkpoint in the end. Default: yes where evaluations and checkpoints coincide."
        },
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether that metric should be large."})

    def __post_init__(self):
        if self.load_best_model_at_end is None:
            same = (self.eval_strategy, self.eval_steps) == (self.save_strategy, self.save_steps)
            self.load_best_model_at_end = self.eval_strategy != "no" and (same or self.save_strategy == "best")
        super().__post_init__()


@dataclass
class TwoDMSETrainingArguments(BestKeepingTrainingArguments):
    """Arguments of [`TwoDMSETrainer`]; see the module's docstring for the defaults that differ."""

    objective: str = field(default="starbucks", metadata={"help": f"What a step trains: {', '.join(OBJECTIVES)}."})
    alignment: str | None = field(
        default=None,
        metadata={"help": "What smaller sizes learn from the largest: none, feature_kl or score_kl. "
                  "Default: feature_kl for 2dmse, score_kl for starbucks, none otherwise."},
    )  # fmt: skip
    alignment_weight: float | None = field(
        default=None,
        metadata={"help": "Factor of the alignment. Default: 1, and 0.3 for starbucks with feature_kl."},
    )
    plain_weight: float = field(
        default=1.0, metadata={"help": "Factor of the alignment on texts without labels, where such are given."}
    )
    teacher: str = field(
        default="largest",
        metadata={"help": "Whom sizes learn from by score_kl. largest: the largest size in the same step; start: the "
                  "largest size as it was before training, which it learns from as well, for a third more time."},
    )  # fmt: skip
    compression_dim: int = field(default=128, metadata={"help": "Dimensions that espresso compresses to."})
    cross_size_weight: float = field(
        default=0.0,
        metadata={"help": "Factor of the loss of queries at each shallower size against documents at the deepest one."},
    )
    initial_share: float = field(
        default=0.0,
        metadata={"help": "After training, average with the initial weights: their share in the last layer, 0 to 1; "
                  "it falls evenly to 0 in the first layer. Keeps the largest size under a large learning rate."},
    )  # fmt: skip
    exit_projections: bool = field(
        default=False,
        metadata={"help": "Give each exit a square matrix of its own, fitted before training to what the full size "
                  "says of the training texts, and trained with the rest."},
    )  # fmt: skip
    loss: str | None = field(
        default=None,
        metadata={"help": f"Base loss: {', '.join(LOSSES)}. Default: infonce for anchors and positives, cosent for "
                  "scored pairs."},
    )  # fmt: skip
    loss_scale: float = field(
        default=SCALE, metadata={"help": "Factor of the similarities in the loss (1 / temperature)."}
    )
    dropout: bool = field(
        default=True, metadata={"help": "Dropout in training, as the backbone's configuration says; false: none."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest text, in tokens; longer ones are cut."})
    num_buckets: int = field(
        default=6,
        metadata={"help": "Groups of similar length that the rows of a step run in, inside one call of the model."},
    )
    gather_negatives: bool = field(
        default=True,
        metadata={"help": "With several processes, compute the loss on the rows of all of them; off, each process sees "
                  "its own negatives and pairs alone."},
    )  # fmt: skip
    gradient_cache_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Examples that run through the model at a time, for batches that do not fit into memory: the "
                  "loss is still that of the whole batch, for a third more time. Default: all at once."},
    )  # fmt: skip
    batch_sampler: str = field(
        default="random",
        metadata={"help": "Which examples meet in a step: random; no_duplicates: no text in two examples of a step, "
                  "where it would be its own negative; group_by_length: examples of similar length."},
    )  # fmt: skip
    mixing: str = field(
        default="proportional",
        metadata={"help": "With several training files each batch comes from one: proportional to their rows, or "
                  "round_robin, until the first is used up."},
    )  # fmt: skip
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Examples a step and process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts a batch of the evaluation."})
    metric_for_best_model: str | None = field(
        default="ladder_mean", metadata={"help": "Metric that chooses the best checkpoint."}
    )

    def __post_init__(self):
        faults = [
            f"{name}: {value!r} is unknown; choose one of {', '.join(allowed)}"
            for name, value, allowed in (
                ("objective", self.objective, tuple(OBJECTIVES)),
                ("alignment", self.alignment or "none", ALIGNMENTS),
                ("teacher", self.teacher, TEACHERS),
                ("loss", self.loss or "infonce", LOSSES),
                ("batch_sampler", self.batch_sampler, BATCH_SAMPLERS),
                ("mixing", self.mixing, MIXINGS),
            )
            if value not in allowed
        ]
        faults += [
            f"{name}: {value!r} is not allowed; use a number of at least {least}"
            for name, value, least in (
                ("max_length", self.max_length, 3),
                ("num_buckets", self.num_buckets, 1),
                ("compression_dim", self.compression_dim, 1),
                ("cross_size_weight", self.cross_size_weight, 0),
                ("plain_weight", self.plain_weight, 0),
                ("per_device_train_batch_size", self.per_device_train_batch_size, 2),
                (
                    "gradient_cache_chunk_size",
                    1 if self.gradient_cache_chunk_size is None else self.gradient_cache_chunk_size,
                    1,
                ),
            )
            if value is not None and value < least
        ]
        if not 0 <= self.initial_share <= 1:
            faults.append(f"initial_share: {self.initial_share} is not allowed; use a share from 0 to 1")
        if faults:
            raise ValueError("; ".join(faults))
        super().__post_init__()


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
