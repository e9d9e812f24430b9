"""The output folder of a training run: whose it is, and moving an earlier run aside."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import itertools
import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# Written when a run starts. Its name starts with a dot, and files that do are never uploaded.
MARKER = ".twodmse-run.json"
# The names of folders with embeddings of a teacher, which `trainer.teacher_embeddings` writes.
TEACHER = "teacher-" + 16 * "[0-9a-f]"
# What a run writes, and what transformers and PEFT write for it. A folder with anything else is not moved aside: it
# would be deleted after the new run.
_WRITTEN = {
    *(MARKER, ".checkpoint-partial", "checkpoint-*", "runs", "*.partial", "training_args.bin", "trainer_state.json"),
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_*"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "*.bpe.model", "spiece.model", "chat_template.*", "*processor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[1-4]_*", "README.md"),
    *("results.json", "heatmap.png", "accuracy.png", "pca.png", "shares.png", "plan.json", "plan.png"),
    *("classify.json", "classify_rows.npz", "encoder", "backbone", "rasa", TEACHER, "__pycache__"),
    *(path.name for path in Path(__file__).resolve().parents[2].glob("modeling_*/*.py")),
}


def checksum(facts: object) -> str:
    """A checksum of what `json` can write."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def mark(folder: str, script: str, **facts: str) -> None:
    """Write into a folder that a run of `script` writes it, and what the run has to know when it resumes."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, MARKER), "w", encoding="utf-8") as file:
        json.dump({"run_of": script, **facts}, file)
        file.write("\n")


def read_mark(folder: str) -> dict[str, str]:
    """What `mark` has written; empty if there is nothing that can be read."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, MARKER), encoding="utf-8") as file:
        found = json.load(file)
        return found if isinstance(found, dict) else {}
    return {}


def check_replaceable(folder: str, arguments: Iterable[object]) -> None:
    """Check that a folder may be moved aside, and deleted when a new run has ended.

    Args:
        folder: the output folder; it need not exist.
        arguments: the dataclasses of the script, whose values may name files.

    Raises:
        ValueError: no run of this project has written the folder, it has other files too, or the new run reads some of
            its files.
    """
    if not os.path.isdir(folder) or not os.listdir(folder):
        return
    if not _is_run(folder):
        raise ValueError(
            f"overwrite: {folder} was not written by a training run of this project, so it is not replaced; choose "
            "another output_dir"
        )
    foreign = [name for name in sorted(os.listdir(folder)) if not _is_written(name)]
    if foreign:
        raise ValueError(
            f"overwrite: {folder} also has {', '.join(foreign[:3])}, which no training run has written; move it away, "
            "or choose another output_dir"
        )
    whole = os.path.realpath(folder)
    for name, path in _paths(arguments):
        found = os.path.realpath(path)
        if found == whole or found.startswith(whole + os.sep):
            raise ValueError(
                f"{name}: {path} is inside output_dir, which --overwrite replaces; choose another output_dir"
            )


def is_fresh(folder: str) -> bool:
    """Whether a folder is absent or has nothing but what a run writes before its first checkpoint."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    # A run computes the embeddings of a teacher before its first step.
    others = {name for name in names if not fnmatch.fnmatchcase(name, TEACHER)}
    return others <= {MARKER, ".checkpoint-partial", "runs"}


def move_aside(folder: str) -> str | None:
    """Rename a folder that has files and make it again, empty; its new name, or None. Links to it stay as they are."""
    folder = os.path.realpath(folder)
    if not os.path.isdir(folder) or not os.listdir(folder):
        return None
    stem = f"{folder}.previous-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    previous = next(name for name in names if not os.path.lexists(name))  # two runs may end within a second
    os.rename(folder, previous)
    os.makedirs(folder)
    return previous


def _is_run(folder: str) -> bool:
    """Whether a run of this project has written the folder: by its marker, or by the arguments that are saved in it."""
    checkpoints = [name for name in os.listdir(folder) if name.startswith("checkpoint-")]
    saved = [os.path.join(folder, *parts, "training_args.bin") for parts in [(), *((name,) for name in checkpoints)]]
    return os.path.isfile(os.path.join(folder, MARKER)) or any(map(_has_our_arguments, saved))


def _has_our_arguments(path: str) -> bool:
    """Whether the file has the pickled arguments of one of our trainers; it is searched for the name, not loaded."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(b"trainer." in archive.read(name) for name in pickles)
    return False


def _is_written(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WRITTEN)


def _paths(arguments: Iterable[object]) -> Iterator[tuple[str, str]]:
    """The names and values of the arguments that are paths of existing files or folders; no outputs."""
    for part in arguments:
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            value = getattr(part, field.name, None)
            values: Sequence = value if isinstance(value, (list, tuple)) else [value]
            for item in values:
                is_output = field.name in ("output_dir", "logging_dir", "resume_from_checkpoint")
                if isinstance(item, str) and item and not is_output and os.path.exists(item):
                    yield field.name, item
