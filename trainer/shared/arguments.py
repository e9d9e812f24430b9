"""What the arguments of all trainings share, and when bf16 is on by default."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available, logging

logger = logging.get_logger(__name__)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@dataclass
class BaseTrainingArguments(TrainingArguments):
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
class ElasticTrainingArguments(BaseTrainingArguments):
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
