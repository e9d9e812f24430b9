"""The life of a training run: its output folder, its checkpoint, how it is stopped and how it ends."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from run_scripts.shared import late_peft  # noqa: F401 (for what it does when it is imported)
from run_scripts.shared import output_dir as folders
from run_scripts.shared.cli import Parser, fail
from run_scripts.shared.output import say
from trainer.shared import checkpoints
from trainer.shared.arguments import check_optimizer
from trainer.shared.callbacks import Interrupted, Terminated
from trainer.shared.checkpoints import SaveError, save_error
from trainer.shared.pictures import PictureError

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class OverwriteArguments:
    """What every training asks about its output folder."""

    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace an output folder that has an earlier run and nothing else: it is moved aside, and "
                  "deleted after the new run has ended well."},
    )  # fmt: skip


class TrainingRun:
    """A run that `training_run` has started.

    Attributes:
        arguments: the dataclasses that were parsed, TrainingArguments last.
        args: TrainingArguments.
        resume: the checkpoint to resume from, or None.
        trainer: None until `begin`.
    """

    def __init__(self, arguments: tuple):
        self.arguments, self.args, self.trainer = arguments, arguments[-1], None
        self.resume = find_checkpoint(self.args)
        self._overwrite = any(isinstance(part, OverwriteArguments) and part.overwrite for part in arguments)
        self._previous: str | None = None
        # A run that is started again with the same command may have ended before its first checkpoint.
        restarted = str(self.args.resume_from_checkpoint).lower() == "true"
        check_output_dir(self.args.output_dir, allowed=bool(self.resume) or self._overwrite or restarted)
        if self._overwrite and not self.resume:
            folders.check_replaceable(self.args.output_dir, arguments)

    def begin(self, trainer, start: str | None = None) -> None:
        """All checks have passed: move an earlier run aside. From here on, a ValueError is an error of the program.

        Args:
            trainer: the trainer of the run.
            start: a checksum of what the run starts from, if a run from another start must not resume it.

        Raises:
            ValueError: the optimizer cannot train the model, or the checkpoint to resume is of another start.
        """
        check_optimizer(self.args, trainer.model)
        if self.resume is not None and start is not None:
            check_same_start(self.resume, start)
        # A slower process would find the files that this one is about to write, and refuse the folder.
        trainer.accelerator.wait_for_everyone()
        if self._overwrite and not self.resume:
            self._previous = move_aside(self.args)
        if self.args.should_save:
            facts = {} if start is None else {"start": start}
            folders.mark(self.args.output_dir, os.path.basename(sys.argv[0]), **facts)
        self.trainer = trainer

    def train(self) -> None:
        """Train; what stops the training ends the program with one line that says how to resume."""
        with self.saving():
            self.trainer.train(resume_from_checkpoint=self.resume)

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """For what is written after training: an error ends the program with one line, as in `train`."""
        return training_errors(self)

    def way_on(self) -> str:
        """What can be done with the output folder of a run that was stopped, as the end of a line."""
        args, folder, again = self.args, str(self.args.output_dir), "run the same command"
        if checkpoints.find_checkpoint(folder, args.world_size, read=False) is not None:
            return f"{again} with --resume_from_checkpoint true to resume"
        if self.resume is not None:  # a checkpoint of another folder
            return f"{again} again to resume from {self.resume}"
        if folders.is_fresh(folder):
            return f"{again} with --resume_from_checkpoint true to start again"
        instead = "" if args.resume_from_checkpoint is None else " instead of --resume_from_checkpoint"
        return f"{again} with --overwrite{instead} to start again"

    def end(self) -> None:
        """Delete the earlier run, and leave the process group."""
        if self._previous is not None:
            shutil.rmtree(self._previous)
        self.trainer.accelerator.end_training()


@contextlib.contextmanager
def training_run(
    parser: Parser, argv: Sequence[str] | None = None, check: Callable[..., None] | None = None
) -> Iterator[TrainingRun]:
    """
    The life of a training run, in this order:

    1. Parse; check the flags, the checkpoint and the output folder.
    2. The `with` block makes the trainer, which checks everything else. So far, nothing on disk has changed.
    3. The block calls `begin`, which moves an earlier run aside, then `train`; it saves the model inside `saving`.
    4. After the block, the earlier run is deleted.

    A ValueError or OSError before `begin` ends the program with one line. If the run fails later, the earlier one stays
    where it was moved.

    Args:
        parser: with the dataclasses of the script, OverwriteArguments among them, a subclass of TrainingArguments last.
        argv: the arguments; those of the process if None.
        check: quick checks of the dataclasses of the script, before TrainingArguments are made.
    """
    use_all_cores()
    run = None

    def check_early(*parts) -> None:
        *mine, values = parts
        if check is not None:
            check(*mine)
        if values.output_dir is not None:
            resumes = str(values.resume_from_checkpoint).lower() not in ("none", "false")
            check_output_dir(values.output_dir, allowed=resumes or values.overwrite)

    try:
        run = TrainingRun(parser.parse(argv, check_early))
        yield run
    except PictureError as error:  # also during training, for which decoding all pictures beforehand takes too long
        fail(error.line)
    except (ValueError, OSError) as error:
        if run is not None and run.trainer is not None:
            raise
        fail(error)
    except KeyboardInterrupt as error:
        raise type(error)(_after_interrupt(run)) from error
    run.end()


def _after_interrupt(run: TrainingRun | None) -> str:
    """What Ctrl-C or SIGTERM has left, if it did not come during the training steps, which end with a checkpoint."""
    return "nothing was written" if run is None or run.trainer is None else run.way_on()


def check_output_dir(path: str, allowed: bool) -> None:
    """ValueError if the folder has files of another run."""
    if os.path.isfile(path):
        raise ValueError(f"output_dir: {path} is a file")
    if os.path.isdir(path) and os.listdir(path) and not allowed:
        raise ValueError(
            f"output_dir: {path} is not empty; choose another folder, pass --overwrite to replace it, or "
            "--resume_from_checkpoint true to resume"
        )


def find_checkpoint(args: "TrainingArguments") -> str | None:
    """The checkpoint that --resume_from_checkpoint names; `true` is the newest complete one of the output folder."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        is_first = args.process_index == 0  # reading all files once is enough
        found = [checkpoints.find_checkpoint(args.output_dir, args.world_size) if is_first else None]
        broadcast_object_list(found)  # processes that resume from different steps would wait for each other forever
        newest = found[0]
        if newest is None and folders.is_fresh(args.output_dir):
            say(f"{args.output_dir} has no checkpoint yet: the run starts from its first step")
            return None
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint: {args.output_dir} has no complete checkpoint to resume from; pass "
                "--overwrite instead to start again"
            )
        check_not_beyond(newest, args.max_steps)
        return newest
    if not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint: {wanted} does not exist")
    problem = checkpoints.find_problem(wanted, args.world_size)
    if problem is not None:
        raise ValueError(f"resume_from_checkpoint: {wanted} cannot be resumed: {problem}")
    check_not_beyond(wanted, args.max_steps)
    return wanted


def check_same_start(checkpoint: str, start: str) -> None:
    """ValueError if the folder of a checkpoint says that its run had another start.

    After another fit, the weights of the checkpoint would be averaged with, or learn from, those of other principal
    directions, which is of no use at any size.
    """
    begun = folders.read_mark(os.path.dirname(os.path.abspath(checkpoint)))
    if begun and begun.get("start") != start:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is of a run with another encoder or other texts (the data, the "
            "model, a flag or the version of this project has changed); resume with those, or pass --overwrite "
            "instead to start again"
        )


def check_not_beyond(checkpoint: str, max_steps: int) -> None:
    """ValueError if a checkpoint is of a later step than the last one of the run; -1 is a run by epochs."""
    step = checkpoints.read_state(checkpoint).global_step
    if 0 < max_steps < step:
        raise ValueError(f"max_steps: {checkpoint} is of step {step}, after the last of {max_steps}")


@contextlib.contextmanager
def training_errors(run: TrainingRun) -> Iterator[None]:
    """For training: what stops it ends the program with one line that says how to resume."""
    trainer = run.trainer
    try:
        yield
    except (FloatingPointError, SaveError) as error:
        fail(error)
    except (OSError, SafetensorError) as error:
        fail(save_error(error, "the model", trainer.args.output_dir))
    except (Interrupted, Terminated):
        number, step = signal.Signals(trainer.stop_signals.received), trainer.state.global_step
        say(f"\nStopped by {number.name} after step {step}; {run.way_on()}")
        raise SystemExit(128 + number) from None


def move_aside(args: "TrainingArguments") -> str | None:
    """Move the folder of an earlier run away, so that it survives if the new run fails; the new name, or None."""
    previous = None
    with args.main_process_first(local=False, desc="moving the earlier run aside"):
        if args.process_index == 0:
            previous = folders.move_aside(args.output_dir)
        if previous is not None:
            say(f"the earlier run is kept in {previous} until this one has ended well")
    return previous


def use_all_cores() -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 unless it is set; a single process on the CPU may use every core."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available()
    if alone and torch.get_num_threads() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
