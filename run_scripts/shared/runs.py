"""The life of a training run: its output folder, its checkpoint, how it stops and ends."""

import contextlib
import os
import shutil
import signal
import time
from dataclasses import dataclass, field

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainingArguments

from run_scripts.shared.cli import fail
from run_scripts.shared.output import say
from trainer.shared import checkpoints
from trainer.shared.checkpoints import SaveError, save_error


@dataclass
class OverwriteArguments:
    """What every training is asked about its output folder."""

    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace an output folder that holds another run; it is moved aside, and deleted when the "
                  "new run has ended well."},
    )  # fmt: skip


def check_output_dir(path: str, allowed: bool) -> None:
    """ValueError if the folder holds files of another run."""
    if os.path.isfile(path):
        raise ValueError(f"output_dir: {path} is a file")
    if os.path.isdir(path) and os.listdir(path) and not allowed:
        raise ValueError(
            f"output_dir: {path} is not empty; choose another folder, pass --overwrite to replace it, or "
            "--resume_from_checkpoint true to go on"
        )


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names, `true` being the newest complete one of the output folder."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        found = [checkpoints.find_checkpoint(args.output_dir, args.world_size)]
        broadcast_object_list(found)  # processes that went on from different steps would wait for each other for ever
        newest = found[0]
        if newest is None:
            raise ValueError(f"resume_from_checkpoint: {args.output_dir} holds no complete checkpoint to go on from")
        return newest
    if not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint: {wanted} does not exist")
    fault = checkpoints.find_fault(wanted, args.world_size)
    if fault is not None:
        raise ValueError(f"resume_from_checkpoint: {wanted} cannot be gone on from: {fault}")
    return wanted


@contextlib.contextmanager
def training_errors(trainer):
    """Around training: what stops it ends in one line that says how to go on."""
    try:
        yield
    except (FloatingPointError, SaveError) as error:
        fail(error)
    except (OSError, SafetensorError) as error:
        fail(save_error(error, "the model", trainer.args.output_dir))
    number = trainer.stop_signals.received
    if number is not None:
        name, step = signal.Signals(number).name, trainer.state.global_step
        say(f"\nStopped by {name} after step {step}; go on with --resume_from_checkpoint true")
        raise SystemExit(128 + number)


def move_aside(args: TrainingArguments) -> str | None:
    """Move an earlier run's folder away, so that a failure of the new run cannot cost it."""
    previous, folder = None, args.output_dir.rstrip(os.sep)
    with args.main_process_first(local=False, desc="moving the earlier run aside"):
        if args.process_index == 0 and os.path.isdir(folder) and os.listdir(folder):
            previous = f"{folder}.previous-{time.strftime('%Y%m%d-%H%M%S')}"
            os.rename(folder, previous)
            os.makedirs(folder)
            say(f"the earlier run is kept in {previous} until this one has ended well")
    return previous


def remove(folder: str | None) -> None:
    """Delete the earlier run that `move_aside` kept."""
    if folder is not None:
        shutil.rmtree(folder)


def use_all_cores() -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 where it is not told otherwise; one process may use every core."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available()
    if alone and torch.get_num_threads() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
