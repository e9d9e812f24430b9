"""The arguments that all trainers share, and when bf16 is on by default."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_xla_available, logging

from .limits import training_problems

logger = logging.get_logger(__name__)

# Reporters that transformers does not look for among the installed libraries.
_UNCHECKED = ("flyte",)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def gpu_has_bf16() -> bool:
    """Whether the training runs on a GPU with bfloat16 hardware, without FSDP or DeepSpeed, whose configuration decides
    on mixed precision."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true" for name in ("FSDP", "DEEPSPEED"))
    return torch.cuda.is_available() and not sharded and torch.cuda.is_bf16_supported(including_emulation=False)


class Secret(str):
    """A string that is not written into files: pickled it is None, and its `repr` hides it.

    Trainer pickles its arguments into `training_args.bin`, next to the weights that are published.
    """

    def __reduce__(self):
        return type(None), ()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __repr__(self):
        return "'***'"


@dataclass
class BaseTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with other defaults, for every trainer of this project.

    The defaults that differ:

    - `bf16` is on if `accelerate launch` sets it, or if the training runs on a GPU that has it, or on a CPU that has
      instructions for it (AMX or AVX512-BF16).
    - `remove_unused_columns` is off: the collators read the columns.
    - `dataloader_pin_memory` is off on a CPU.
    - `logging_nan_inf_filter` is off: a loss that is not finite stops the run.
    - `eval_strategy` is `steps`. Evaluations and checkpoints come at each quarter of the run.

    `hub_token` becomes a `Secret`: no file of a run contains it.

    Raises:
        ValueError: a number makes no sense, see `limits.TRAINING`; the message names all of them.
    """

    # None, which transformers' annotation does not have, tells an unset flag from false.
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "bf16 mixed precision. Default: as `accelerate launch` sets it, else on for GPUs that have "
            "it and CPUs with AMX or AVX512-BF16."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the collator reads the columns."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave off: a loss that is not finite stops the run."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(
        default=0.25, metadata={"help": "Optimizer steps between evaluations; below 1, a fraction of all steps."}
    )
    save_steps: float = field(
        default=0.25, metadata={"help": "Optimizer steps between checkpoints; below 1, a fraction of all steps."}
    )

    def __post_init__(self):
        problems = training_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        on_cpu = self.use_cpu or not (torch.accelerator.is_available() or is_torch_xla_available())
        if self.fp16 and on_cpu:  # accelerate would leave it out and say nothing
            raise ValueError("fp16: true needs a GPU; a CPU trains in --bf16 true or --bf16 false")
        if self.bf16 is None:
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate launch
            chosen = launched == "no" and (cpu_has_bf16() if on_cpu else gpu_has_bf16())
            self.bf16 = not self.fp16 and (chosen or launched == "bf16")
            if chosen and self.bf16:
                self._bf16_chosen_for = "CPU" if on_cpu else "GPU"
        # Without use_cpu, transformers refuses bf16 on a machine without a GPU.
        self.use_cpu = self.use_cpu or (on_cpu and self.bf16)
        self.dataloader_pin_memory = self.dataloader_pin_memory and not on_cpu  # without a GPU, torch warns of it
        super().__post_init__()
        _check_reporters(cast(list[str], self.report_to))  # Trainer's arguments make a list of it
        if not on_cpu and isinstance(self.accelerator_config, AcceleratorConfig):
            self.accelerator_config.non_blocking = True  # copies from pinned memory need not be waited for
        if self.hub_token is not None:
            self.hub_token = Secret(self.hub_token)

    def say_precision(self) -> None:
        """Say, once, that bf16 is on although nobody has asked for it. Trainers do when they start to train: before,
        it would be one more line above an error."""
        where = self.__dict__.pop("_bf16_chosen_for", None)
        if where is not None:
            logger.warning(f"bf16 is on: this {where} has instructions for it (turn it off with --bf16 false)")

    @property
    def n_gpu(self) -> int:
        """At most 1, so that Trainer does not use `DataParallel`, which would split the inputs of a step."""
        if super().n_gpu > 1:
            logger.warning_once("using one GPU; start with `accelerate launch` to use all of them")
        return min(1, super().n_gpu)


def _check_reporters(names: Sequence[str]) -> None:
    """ValueError if a name of `report_to` is unknown, or its library is missing: Trainer finds out later."""
    # Three seconds, which a flag that is refused need not wait for.
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", *INTEGRATION_TO_CALLBACK])
            raise ValueError(f"report_to: {name!r} is unknown; use some of {known}")
        if name not in installed and name not in _UNCHECKED:
            some = ", ".join(["none", *installed])
            raise ValueError(f"report_to: the library of {name} is not installed; install it, or use some of {some}")


def check_optimizer(args: TrainingArguments, model: torch.nn.Module) -> None:
    """ValueError for an optimizer or a schedule that cannot be made, which Trainer only finds out when it trains."""
    from transformers import Trainer, get_scheduler  # takes seconds; a script makes its arguments before

    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]  # PEFT's models too
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        more = f" with the optim_args {args.optim_args}" if args.optim_args else ""
        raise ValueError(f"optim: {OptimizerNames(args.optim).value}{more} cannot be used: {error}") from error
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    options = cast(dict[str, Any], args.lr_scheduler_kwargs or {})
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs: {options} does not fit {SchedulerType(args.lr_scheduler_type).value}: {error}"
        ) from error


@dataclass
class ElasticTrainingArguments(BaseTrainingArguments):
    """The arguments of trainers that train a ladder of sizes."""

    sizes: list[str] | None = field(
        default=None, metadata={"help": "The sizes to train, as LAYERSxDIM, for example 1x32 2x64 6x384."}
    )


@dataclass
class BestKeepingTrainingArguments(ElasticTrainingArguments):
    """The arguments of trainers that keep the checkpoint with the best score.

    The defaults that differ from `BaseTrainingArguments`: warm-up over the first tenth of the steps, and the best
    checkpoint is kept at the end if evaluations and checkpoints coincide.
    """

    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up in optimizer steps; below 1, a fraction of all steps."}
    )
    load_best_model_at_end: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Keep the best checkpoint at the end. Default: on if evaluations and checkpoints coincide."},
    )
    greater_is_better: bool | None = field(
        default=True, metadata={"help": "Whether higher values of metric_for_best_model are better."}
    )

    def __post_init__(self):
        if self.load_best_model_at_end is None:
            same = (self.eval_strategy, self.eval_steps) == (self.save_strategy, self.save_steps)
            self.load_best_model_at_end = self.eval_strategy != "no" and (same or self.save_strategy == "best")
        super().__post_init__()
