"""The numbers that training arguments may have."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Range(NamedTuple):
    """Numbers from `lowest` to `highest`, without the ends that are open; none is infinite."""

    lowest: float = 0
    highest: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        above = value > self.lowest if self.open_below else value >= self.lowest
        return above and (value < self.highest if self.open_above else value <= self.highest)

    def __str__(self) -> str:
        low = f"above {self.lowest:g}" if self.open_below else f"of at least {self.lowest:g}"
        if self.highest == math.inf:
            return f"a number {low}"
        return f"a number {low} and {'below' if self.open_above else 'at most'} {self.highest:.10g}"


COUNT, WEIGHT, POSITIVE, FRACTION = Range(1), Range(0), Range(0, open_below=True), Range(0, 1, open_above=True)
# Fields of transformers' TrainingArguments, which does not check them. None, where it is allowed, is not checked.
TRAINING = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), WEIGHT),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), WEIGHT),
    **dict.fromkeys(("num_train_epochs", "adam_epsilon", "eval_steps", "save_steps", "logging_steps"), POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), FRACTION),
    **{name: Range(0, 2**32 - 1) for name in ("seed", "data_seed")},
}


def find_problems(arguments: object, ranges: Mapping[str, Range]) -> list[str]:
    """A message for each field whose number is not in its range; None is an unset field."""
    values = ((name, getattr(arguments, name, None), allowed) for name, allowed in ranges.items())
    return [
        f"{name}: {value} is not allowed; use {allowed}"
        for name, value, allowed in values
        if value is not None and value not in allowed
    ]


def training_problems(arguments: object) -> list[str]:
    """A message for each field of transformers' `TrainingArguments` whose number makes no sense."""
    steps = getattr(arguments, "max_steps", -1)
    # With steps, the epochs are not used, as steps of evaluations and checkpoints are not with another strategy.
    unused = {"num_train_epochs"} if steps > 0 else set()
    unused |= {
        f"{name}_steps"
        for name in ("eval", "save", "logging")
        if str(getattr(arguments, f"{name}_strategy")) != "steps"
    }
    ranges = {name: allowed for name, allowed in TRAINING.items() if name not in unused}
    problems = find_problems(arguments, ranges)
    if steps != -1 and steps not in COUNT:
        problems.append(f"max_steps: {steps} is not allowed; use {COUNT}, or -1 to train for num_train_epochs")
    return problems
