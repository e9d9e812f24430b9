"""What the arguments of all trainers share; TwoDMSETrainingArguments and SmaeTrainingArguments.

TwoDMSETrainingArguments' defaults that differ from transformers': batch size 64 (in-batch negatives need company),
warm-up over the first tenth, unused columns kept (the collator reads the text columns), evaluation and checkpoints at
each quarter of the run with the best checkpoint (by the ladder's mean) kept in the end, and bf16 switched on where a
CPU has instructions for it or `accelerate launch` asks for it.
"""

from dataclasses import dataclass, field

from .losses import LOSSES, SCALE
from .objectives import ALIGNMENTS, OBJECTIVES, TEACHERS
from .shared.arguments import BestKeepingTrainingArguments
from .shared.sampling import BATCH_SAMPLERS, MIXINGS


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
    unlabeled_weight: float = field(
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
                ("unlabeled_weight", self.unlabeled_weight, 0),
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
