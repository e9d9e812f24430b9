"""Logging the parts of a loss by name, as means over the steps between two log entries."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from .arguments import BaseTrainingArguments
from .callbacks import StopSignals
from .mixin import TrainerMixin, check_at_hand


class _Step(NamedTuple):
    """The loss of a step and its parts, in CPU memory once `arrived` says so."""

    number: int
    names: tuple[str, ...]
    values: torch.Tensor
    arrived: Callable[[bool], bool]


class PartLogMixin(TrainerMixin):
    """Goes before `Trainer`: `record` takes the parts of each step's loss, and `log` adds their means to the log.

    A step does not wait for the GPU. Its values are copied to the host while the next steps run, and are looked at when
    they have arrived, at the latest before the next log entry or checkpoint.

    Attributes:
        stop_signals: the callback that ends training when a signal arrives; `train` then raises its error.
    """

    stop_signals: StopSignals

    def train(self, *args, **kwargs):
        if isinstance(self.args, BaseTrainingArguments):
            self.args.say_precision()
        if self.model is not None:
            check_at_hand(self.model)  # it may have been offloaded after the trainer was built
        output = super().train(*args, **kwargs)
        self.stop_signals.check()
        return output

    def record(self, loss: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Add the parts of a step to the sums since the last log entry.

        Trainer's own filter of losses that are not finite would hide them, and is off.

        Args:
            loss: the loss of the step, a scalar.
            parts: detached scalars by name, for example `loss/2x64`.

        Raises:
            FloatingPointError: the loss of this step, or of an earlier one whose values have arrived meanwhile, is not
                finite; the message names the step and the parts that are not.
        """
        steps = self.__dict__.setdefault("_part_steps", deque())
        values, arrived = copy_to_host(torch.stack([loss.detach().float(), *(v.float() for v in parts.values())]))
        steps.append(_Step(self.state.global_step + 1, tuple(parts), values, arrived))
        self._take_steps(wait=False)

    def log(self, logs, start_time=None):
        """Add each part's mean since the last entry, for example `loss/2x64`."""
        self._take_steps(wait=True)
        if "loss" in logs:
            counts = self.__dict__.pop("_part_counts", {})
            for name, total in self.__dict__.pop("_part_sums", {}).items():
                logs[name] = total / counts[name]
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        self._take_steps(wait=True)  # a checkpoint must not follow a loss that is not finite
        super()._save_checkpoint(model, trial)

    def _take_steps(self, wait: bool) -> None:
        steps = self.__dict__.get("_part_steps", deque())
        sums, counts = self.__dict__.setdefault("_part_sums", {}), self.__dict__.setdefault("_part_counts", {})
        while steps and steps[0].arrived(wait):
            step = steps.popleft()
            loss, *values = step.values.tolist()
            if not math.isfinite(loss):
                names = list(itertools.compress(step.names, (not math.isfinite(value) for value in values)))
                raise FloatingPointError(
                    f"the loss is {loss} in step {step.number}, from {', '.join(names)}; the last checkpoint is kept: "
                    "lower the learning rate, or resume from it without half precision"
                )
            for name, value in zip(step.names, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1


def copy_to_host(values: torch.Tensor) -> tuple[torch.Tensor, Callable[[bool], bool]]:
    """Start the copy of a tensor to the host.

    Args:
        values: on any device.

    Returns:
        the tensor on the host, and a function that tells whether it has arrived, and waits for it if its argument is
        true.
    """
    if not values.is_cuda:
        return values.cpu(), lambda wait: True
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def arrived(wait: bool) -> bool:
        if wait:
            event.synchronize()
        return event.query()

    return host, arrived
