"""The arguments of `TwoDMSETrainer`."""

import os
from dataclasses import dataclass, field

import torch

from .choices import CHOICES, LOSSES, OBJECTIVES, find_unknown
from .losses import SCALES
from .shared.arguments import BestKeepingTrainingArguments
from .shared.limits import COUNT, POSITIVE, WEIGHT, Range, find_problems, training_problems

_RANGES = {
    **dict.fromkeys(("alignment_weight", "cross_size_weight", "embedding_weight", "unlabeled_weight"), WEIGHT),
    **dict.fromkeys(("num_buckets", "compression_dim", "gradient_cache_chunk_size"), COUNT),
    **{
        "loss_scale": POSITIVE,
        "max_length": Range(3),
        "max_query_length": Range(3),
        "per_device_train_batch_size": Range(2),
    },
}


@dataclass
class TwoDMSETrainingArguments(BestKeepingTrainingArguments):
    """Arguments of `TwoDMSETrainer`.

    The defaults that differ from transformers' `TrainingArguments`, besides those of `BaseTrainingArguments`:

    - a batch size of 64, because in-batch negatives need many examples;
    - warm-up over the first tenth of the steps;
    - the checkpoint with the best `eval_ladder_mean` is kept at the end, if evaluations and checkpoints coincide;
    - on a GPU, two processes prepare the batches.

    `initial_share` is weight-space ensembling (WiSE-FT, Wortsman et al. 2022), with a share per layer: see
    `trainer.averaging`.

    Raises:
        ValueError: values that are not allowed; the message names all of them.
    """

    objective: str = field(default="starbucks", metadata={"help": f"The training objective: {', '.join(OBJECTIVES)}."})
    alignment: str | None = field(
        default=None,
        metadata={"help": "How sizes learn from the largest: none, feature_kl, score_kl, query_kl. Default: feature_kl "
                  "for 2dmse, score_kl for starbucks."},
    )  # fmt: skip
    alignment_weight: float | None = field(
        default=None, metadata={"help": "Weight of the alignment. Default: 1; 0.3 for starbucks with feature_kl."}
    )
    feature_kl_form: str = field(
        default="raw",
        metadata={"help": "What feature_kl compares: raw (states, teacher with gradient, as the authors), "
                  "raw_detached, normalized or normalized_detached."},
    )  # fmt: skip
    draw_full_dim: bool = field(
        default=False,
        metadata={"help": "For 2dmse, draw the dim from the hidden size too; the released code draws only below it."},
    )
    separate_full_width: bool = field(
        default=False,
        metadata={"help": "For separate, train all dimensions and cut when evaluating (Starbucks' code), instead of "
                  "training at the size."},
    )  # fmt: skip
    unlabeled_weight: float = field(
        default=1.0, metadata={"help": "Weight of the alignment on texts without labels, if there are any."}
    )
    teacher: str = field(
        default="largest",
        metadata={"help": "Teacher of score_kl and query_kl: largest (size in the step), start (the model before "
                  "training; a third slower) or embeddings (given to the trainer)."},
    )  # fmt: skip
    embedding_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of each size's distance (1 - cosine) to the teacher's first dimensions."},
    )
    shallow_steps: float = field(
        default=0.0,
        metadata={"help": "Share of the steps that train only the sizes of at most a third of the layers (every third "
                  "one: two thirds); they are cheap. Needs teacher start or embeddings."},
    )  # fmt: skip
    compression_dim: int = field(default=128, metadata={"help": "Dimensions that espresso compresses to."})
    cross_size_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss of queries at each shallower size and documents at the deepest."},
    )
    initial_share: float = field(
        default=0.0,
        metadata={"help": "After training, average with the initial weights (WiSE-FT): their share, 0 to 1, in the "
                  "last layer."},
    )  # fmt: skip
    initial_share_by_layer: str = field(
        default="linear",
        metadata={"help": "The share in the other layers: linear, rising from 0 in the first, or step, 0 up to the "
                  "smallest size's last layer and all of it above."},
    )  # fmt: skip
    exit_projections: bool = field(
        default=False,
        metadata={
            "help": "Give each exit its own square matrix, fitted to the full size's embeddings and then trained."
        },
    )
    exit_gates: bool = field(
        default=False,
        metadata={"help": "After training, let exits below the last one weigh the tokens of a text: better small "
                  "sizes, which are exported as ONNX only."},
    )  # fmt: skip
    refine_projections: bool = field(
        default=False,
        metadata={
            "help": "After training, refine the projections of the exits below the last one, and rotate the last one."
        },
    )
    loss: str | None = field(
        default=None,
        metadata={"help": f"Base loss: {', '.join(LOSSES)}. Default: infonce for anchors and positives, distill_kl if "
                  "they have a teacher's scores, cosent for scores."},
    )  # fmt: skip
    # None, until `similarity` is known.
    loss_scale: float | None = field(
        default=None,
        metadata={"help": "Factor of the similarities in the loss (1 / temperature). Default: 20, for dot 1."},
    )
    similarity: str | None = field(
        default=None,
        metadata={"help": "How embeddings are compared: cosine or dot (not normalised); saved with the model. Default: "
                  "cosine."},
    )  # fmt: skip
    query_prompt: str | None = field(
        default=None,
        metadata={"help": "Text put before each anchor; saved as the model's prompt query. Default: the model's."},
    )
    document_prompt: str | None = field(
        default=None,
        metadata={"help": "Text put before each positive and negative; saved as the model's prompt document. Default: "
                  "the model's."},
    )  # fmt: skip
    dropout: bool = field(default=True, metadata={"help": "Train with the dropout of the backbone's configuration."})
    max_length: int = field(default=128, metadata={"help": "Maximum length of a text in tokens; longer texts are cut."})
    max_query_length: int | None = field(
        default=None, metadata={"help": "Maximum length of an anchor or query in tokens. Default: max_length."}
    )
    num_buckets: int = field(
        default=6, metadata={"help": "Groups of similar length that the rows of a step are run in, to save padding."}
    )
    gather_negatives: bool = field(
        default=True,
        metadata={"help": "With several processes, compute the loss on the rows of all processes, not of each alone."},
    )
    gradient_cache_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Examples per chunk, for batches larger than the memory; same loss, half as slow again. "
                  "Default: no chunks."},
    )  # fmt: skip
    batch_sampler: str = field(
        default="random",
        metadata={"help": "Examples of a step: random, no_duplicates (no text twice) or group_by_length (similar "
                  "lengths)."},
    )  # fmt: skip
    mixing: str = field(
        default="proportional",
        metadata={
            "help": "Batches from several files: proportional to their rows, or round_robin until one is used up."
        },
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Examples per step and process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts per batch in evaluations."})
    # None, which transformers' annotation does not have, tells an unset flag from 0.
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Processes that prepare batches. Default: 2 on a GPU, else 0."}
    )
    metric_for_best_model: str | None = field(
        default="ladder_mean", metadata={"help": "Metric that selects the best checkpoint."}
    )

    def __post_init__(self):
        self.check()
        self.metric_for_best_model = self.metric_for_best_model or "ladder_mean"  # transformers' default is the loss
        if self.loss_scale is None:
            self.loss_scale = SCALES[self.similarity or "cosine"]
        if self.dataloader_num_workers is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.dataloader_num_workers = 2 if on_gpu else 0
            self.dataloader_persistent_workers = on_gpu  # they keep the tokens of the texts that they have seen
        if self.dataloader_num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else each worker warns of it, and switches it off
        super().__post_init__()

    def check(self) -> None:
        """ValueError for values that are not allowed: those of the constructor, and those of a trial of a search."""
        unset = {"alignment": "none", "loss": "infonce", "similarity": "cosine"}
        problems = find_unknown({name: getattr(self, name) or unset.get(name) for name in CHOICES})
        problems += find_problems(self, _RANGES)
        problems += [problem for problem in training_problems(self) if problem.split(":")[0] not in _RANGES]
        if not 0 <= self.initial_share <= 1:
            problems.append(f"initial_share: {self.initial_share} is not allowed; use a number from 0 to 1")
        if not 0 <= self.shallow_steps < 1:
            problems.append(f"shallow_steps: {self.shallow_steps} is not allowed; use a number from 0 to below 1")
        if self.neftune_noise_alpha:
            problems.append("neftune_noise_alpha: leave it out; the texts of a step are not padded to one length")
        if self.label_smoothing_factor:
            problems.append("label_smoothing_factor: leave it out; no loss has classes to smooth")
        if self.train_sampling_strategy == "group_by_length":
            problems.append("train_sampling_strategy: set batch_sampler to group_by_length instead")
        if problems:
            raise ValueError("; ".join(problems))
