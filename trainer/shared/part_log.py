"""Logging the parts of a loss by name, as means between two entries of the log."""

import torch


class PartLogMixin:
    """Before `Trainer`: `record` what a step gives, and `log` adds the means since the last entry."""

    def record(self, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        """Add detached scalars, which stay on their device; FloatingPointError naming the parts of a loss not finite.

        This is the one number that a step waits for; the Trainer's own filter, which would hide it, is off.
        """
        if not torch.isfinite(loss):
            names = [name for name, value in parts.items() if not torch.isfinite(value)]
            raise FloatingPointError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}, from {', '.join(names)}; the last "
                "checkpoint is kept: lower the learning rate, or go on from there without half precision"
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
