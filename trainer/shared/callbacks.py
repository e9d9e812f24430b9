"""Callbacks that the trainers share."""

import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step too, so that the final weights compete for the best checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class LogShortRuns(TrainerCallback):
    """Logs ten times in a run that the default of transformers, 500 steps between two logs, would leave without any."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.logging_steps == TrainingArguments.logging_steps:
            state.logging_steps = min(state.logging_steps, max(1, state.max_steps // 10))


class SetEpoch(TrainerCallback):
    """Sets `target.epoch` at the start of each epoch. A sampler or collator derives its random choices from it.

    accelerate does the same for samplers, but not when it has wrapped one to skip batches, as it does when several
    processes resume.
    """

    def __init__(self, target):
        self.target = target

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.target is not None:
            self.target.epoch = int(state.epoch or 0)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has ended training, after a step and its checkpoint."""


class Terminated(SystemExit):
    """SIGTERM has ended training, after a step and its checkpoint."""


class StopSignals(TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGTERM or Ctrl-C arrives.

    A second signal ends it at once. `check` then raises an error, so that what a program does after training, such as
    saving or publishing, is not done with a model whose training was cut short.

    Attributes:
        received: the number of the signal, None if none has arrived.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = None
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step_end(self, args, state, control, **kwargs):
        self.received = _agree(self.received, args)
        if self.received is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()

    def check(self) -> None:
        """Interrupted or Terminated, whose exit code is 128 and the number of the signal, if one has arrived."""
        if self.received == signal.SIGINT:
            raise Interrupted
        if self.received is not None:
            raise Terminated(128 + self.received)

    def _note(self, number, frame):
        self.received = number
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _agree(received: int | None, args) -> int | None:
    """The signal that any of the processes has received: all must stop after the same step."""
    if args.world_size == 1:
        return received
    flag = torch.tensor(received or 0, device=args.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag.item()) or None
