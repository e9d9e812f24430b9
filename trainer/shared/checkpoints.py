"""Checkpoints that appear complete or not at all, and finding the newest complete one."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from .mixin import TrainerMixin

logger = logging.get_logger(__name__)

# A checkpoint is written into this folder, and moved out of it when it is complete.
STAGING = ".checkpoint-partial"
STATE_NAME = "trainer_state.json"
# The size and the checksum of every other file of a checkpoint. Files whose names start with a dot are never uploaded.
CHECKSUMS_NAME = ".checksums.json"


class SaveError(RuntimeError):
    """A checkpoint or model could not be written; the message is one line for the user."""


class CheckpointMixin(TrainerMixin):
    """Goes before `Trainer`: a checkpoint is complete on disk before it gets its name and older ones are deleted."""

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self.__dict__.get("_is_staging") else folder

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the model, as `Trainer.save_model` does; FloatingPointError if a weight is not finite."""
        self.check_finite()
        super().save_model(output_dir, _internal_call)

    def check_finite(self) -> None:
        """FloatingPointError if a weight of the model is not finite: the last step may have broken it."""
        for name, parameter in cast(torch.nn.Module, self.model).named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP: this process's part
            if not local.detach().isfinite().all():
                raise FloatingPointError(
                    f"the weights of {name} are not finite after step {self.state.global_step}, so they are not saved; "
                    "lower the learning rate"
                )

    def _run_epoch(self, *args, **kwargs):
        # Trainer would do a step more of a run that was resumed after its last step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        with as_defined(cast(torch.nn.Module, self.model)) if self.is_fsdp_enabled else contextlib.nullcontext():
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        from transformers.trainer import TRAINING_ARGS_NAME  # loads peft and datasets, which a refusal need not

        from modeling_2dmse.file_modes import share_weights

        # Of adapters too, which PEFT saves.
        share_weights(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model, trial):
        folder = self._get_output_dir(trial)
        staging, name = os.path.join(folder, STAGING), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._is_staging = False
            best = self.state.best_model_checkpoint
            if best is not None:  # the state must name the path that the best checkpoint will have
                self.state.best_model_checkpoint = os.path.join(folder, os.path.basename(best))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staging, name, STATE_NAME))
                _write_checksums(Path(staging, name))
                _flush(Path(staging, name))
                _move(staging, name, folder)
        except FloatingPointError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = save_error(error, name, folder)
            shutil.rmtree(staging, ignore_errors=True)
            raise failure from error
        finally:
            self._is_staging = False
        if self.args.should_save:
            limit = self.args.save_total_limit
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def as_defined(model: torch.nn.Module) -> Iterator[None]:
    """Restore the class of a model: FSDP2 replaces it by torch's, whose name and files would be saved as its code."""
    from torch.distributed.fsdp import FSDPModule  # not every build of torch has it

    split = type(model)
    bases = [base for base in split.__mro__ if issubclass(base, torch.nn.Module)]
    model.__class__ = next(base for base in bases if not issubclass(base, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = split


def save_error(error: Exception, what: str, folder: str) -> SaveError:
    """The error of a failed save, in one line for the user."""
    text = " ".join(str(error).split())
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    full = full or shutil.disk_usage(folder).free < 2**20  # torch's own message does not mention the disk
    reason = "no space is left on the disk" if full else text[:200]
    kept = find_checkpoint(folder)
    rest = f"; {os.path.basename(kept)} is intact: resume from it with --resume_from_checkpoint true" if kept else ""
    return SaveError(f"output_dir: {what} could not be written to {folder}: {reason}{rest}")


def find_checkpoint(folder: str, world_size: int | None = None, read: bool = True) -> str | None:
    """The newest complete checkpoint in an output folder, with a warning for each newer one that is incomplete.

    The files of one that has just been written need not be read, which takes long for large models.
    """
    if not os.path.isdir(folder):
        return None
    found = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in os.listdir(folder)]
    for match in sorted(filter(None, found), key=lambda match: -int(match[1])):
        path = os.path.join(folder, match[0])
        problem = find_problem(path, world_size, read)
        if problem is None:
            return path
        logger.warning(f"{path} is incomplete and is skipped: {problem}")
    return None


def find_problem(checkpoint: str, world_size: int | None = None, read: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed, None if it can.

    Args:
        checkpoint: its folder.
        world_size: the number of processes that resume.
        read: read all files; else only what is missing is found.
    """
    if not os.path.isdir(checkpoint):
        return "it is not a folder"
    problem = _state_problem(os.path.join(checkpoint, STATE_NAME))
    if problem is not None:
        return f"{STATE_NAME} is {problem}"
    names = sorted(os.listdir(checkpoint))
    states = [name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name)]
    if not states or (world_size is not None and len(states) < world_size):
        return f"it has the random states of {len(states)} processes"
    weights = [name for name in names if name.endswith(".safetensors")]
    sharded = any(re.match(r"pytorch_model_fsdp|global_step\d", name) for name in names)  # FSDP, DeepSpeed
    if not sharded and not (weights and {"optimizer.pt", "scheduler.pt"} <= set(names)):
        return "weights, optimizer or scheduler are missing"
    written = _read_checksums(checkpoint)
    if written is None:
        return f"{CHECKSUMS_NAME} is damaged"
    for name in sorted({*names, *written}) if read else ():
        path = os.path.join(checkpoint, name)
        problem = _difference(path, *written[name]) if name in written else _file_problem(path)
        if problem is not None:
            return f"{name} is {problem}"
    return None


def read_state(checkpoint: str) -> TrainerState:
    """The trainer's state in a checkpoint."""
    return TrainerState.load_from_json(os.path.join(checkpoint, STATE_NAME))


def _state_problem(path: str) -> str | None:
    try:
        state = TrainerState.load_from_json(path)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):  # UTF-8 and JSON: ValueError
        return "missing or cut off"
    numbers = (state.global_step, state.max_steps, state.epoch, state.num_train_epochs)
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers):
        return "damaged"
    return None if isinstance(state.global_step, int) and isinstance(state.log_history, list) else "damaged"


def _write_checksums(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    written = {path.relative_to(folder).as_posix(): (path.stat().st_size, _checksum(path)) for path in paths}
    Path(folder, CHECKSUMS_NAME).write_text(json.dumps(written, indent=1), encoding="utf-8")


def _read_checksums(checkpoint: str) -> dict[str, tuple[int, str]] | None:
    """Size and checksum by file; empty for a checkpoint that has none, None if they are damaged."""
    path = Path(checkpoint, CHECKSUMS_NAME)
    if not path.is_file():
        return {}
    try:
        written = {name: (int(size), str(checksum)) for name, (size, checksum) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return None if any(".." in Path(name).parts or os.path.isabs(name) for name in written) else written


def _checksum(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(path: str, size: int, checksum: str) -> str | None:
    """How a file differs from what was written; None if it is the same."""
    try:
        if os.path.getsize(path) < size:
            return "cut off"
        return None if _checksum(path) == checksum else "damaged"
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"not readable: {error.strerror}"


def _file_problem(path: str) -> str | None:
    """What is wrong with a file of weights or of a state that has no checksum of ours, as far as its format shows."""
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                pass
        elif path.endswith((".pt", ".pth")):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # compares the checksum of every part
                    return "damaged"
            with safe_globals():  # as Trainer does; the tensors themselves are not read again
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        elif path.endswith(".json"):
            json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, zipfile.BadZipFile):
        return "cut off"
    except (ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError,
            struct.error, zlib.error):  # fmt: skip
        return "damaged"
    return None


def _flush(folder: Path) -> None:
    """Make sure that the files are on the disk before their folder gets its final name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(staging: str, name: str, folder: str) -> None:
    final = os.path.join(folder, name)
    if os.path.isdir(final):  # the same step is saved again
        os.rename(final, os.path.join(staging, f"old-{name}"))
    os.rename(os.path.join(staging, name), final)
    shutil.rmtree(staging)
