"""Logging the parts of a loss by name, as means over the steps between two log entries."""

from collections.abc import Mapping

import torch

from .mixin import TrainerMixin


class PartLogMixin(TrainerMixin):
    """Goes before `Trainer`: `record` takes the parts of each step's loss, and `log` adds their means to the log."""

    def record(self, loss: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Add the parts of a step to the sums since the last log entry. The sums stay on their device.

        This check of the loss is the only place where a step waits for the device. Trainer's own filter of losses that
        are not finite would hide them, and is off.

        Args:
            loss: the loss of the step, a scalar.
            parts: detached scalars by name, for example `loss/2x64`.

        Raises:
            FloatingPointError: the loss is not finite; the message names the parts that are not.
        """
        if not torch.isfinite(loss):
            names = [name for name, value in parts.items() if not torch.isfinite(value)]
            raise FloatingPointError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}, from {', '.join(names)}; the last "
                "checkpoint is kept: lower the learning rate, or resume from it without half precision"
            )
        sums, counts = self.__dict__.setdefault("_part_sums", {}), self.__dict__.setdefault("_part_counts", {})
        for name, value in parts.items():
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0) + 1

    def log(self, logs, start_time=None):
        """Add each part's mean since the last entry, for example `loss/2x64`."""
        if "loss" in logs:
            counts = self.__dict__.pop("_part_counts", {})
            for name, total in self.__dict__.pop("_part_sums", {}).items():
                logs[name] = total.item() / counts[name]
        super().log(logs, start_time)
