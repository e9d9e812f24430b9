"""Good inputs of every kind, and ways to damage copies of them, for tests/test_hostile_inputs.py."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from conftest import LADDER, SENTENCES
from safetensors.torch import load_file, save_file

from modeling_2dmse import TwoDMSEModel
from run_scripts import build_index, encode, finetune

ROWS = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(SENTENCES)]
QUERIES = [{"_id": f"q{i}", "text": text} for i, text in enumerate(SENTENCES[:3])]
Change = Callable[[Path], None]
TRAINING = (
    *("--objective", "2dmse", "--per_device_train_batch_size", "4", "--max_eval_samples", "0", "--bf16", "false"),
    *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--sizes", *LADDER),
)


class Case(NamedTuple):
    """A script, its flags, what is damaged in a copy (`{bad}`) of a part of the workspace (`{w}`), and the line."""

    run: object
    flags: tuple[str, ...]
    message: str
    part: str | None = None
    change: object = None


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(folder: Path, backbone: str) -> None:
    """Write a model, texts, tables, a BEIR folder, embeddings, an index and a run with two checkpoints."""
    TwoDMSEModel.from_backbone(backbone, sizes=LADDER).save_pretrained(folder / "model")
    projected = TwoDMSEModel.from_backbone(backbone, sizes=LADDER)
    projected.add_exit_projections()
    projected.save_pretrained(folder / "projected")
    shutil.copytree(backbone, folder / "plain")
    (folder / "texts.txt").write_text("\n".join(SENTENCES))
    pairs = [f"{a},{b}" for a, b in zip(SENTENCES[::2], SENTENCES[1::2], strict=True)]
    (folder / "pairs.csv").write_text("\n".join(["anchor,positive", *pairs]))
    (folder / "scored.csv").write_text(
        "\n".join(["sentence1,sentence2,score", *(f"{row},{i}" for i, row in enumerate(pairs))])
    )
    write_lines(folder / "beir" / "corpus.jsonl", ROWS)
    write_lines(folder / "beir" / "queries.jsonl", QUERIES)
    (folder / "beir" / "qrels").mkdir()
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    model = ("--model_name_or_path", str(folder / "model"))
    embeddings = str(folder / "embeddings")
    encode.main([*model, "--input", str(folder / "texts.txt"), "--output_dir", embeddings, "--shard_size", "8"])
    more = ("--prefixes", "8", "16:binary", "--approximate", "8:HNSW4")
    build_index.main(["--embeddings", embeddings, "--output_dir", str(folder / "index"), *more])
    data = ("--train_file", str(folder / "pairs.csv"), "--output_dir", str(folder / "run"))
    finetune.main([*model, *data, *TRAINING, "--max_steps", "4", "--save_steps", "2"])


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def put(name: str, *keys, value) -> Change:
    """Set a value in a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return change


def drop(name: str, key: str) -> Change:
    """Remove a value of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return change


def text(name: str, content: str | bytes) -> Change:
    """Replace a file."""
    return lambda folder: (
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        or (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    )


def flip(name: str, place: float = 0.5) -> Change:
    """Change a few bytes at a fraction of a file."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        start = int(place * len(content))
        content[start : start + 16] = bytes(byte ^ 0x55 for byte in content[start : start + 16])
        (folder / name).write_bytes(content)

    return change


def cut(name: str, keep: float = 0.5) -> Change:
    """Keep the first part of a file."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return change


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the weights."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors",
                  {"format": "pt"})  # fmt: skip

    return change


def array(name: str, value: np.ndarray) -> Change:
    return lambda folder: np.save(folder / name, value, allow_pickle=True)


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def packed(content: str, damage: str) -> bytes:
    """Compressed text, cut off or with wrong bytes."""
    whole = bytearray(gzip.compress(content.encode(), mtime=0))
    if damage == "cut":
        return bytes(whole[: len(whole) // 2])
    if damage == "flipped":
        middle = len(whole) // 2
        whole[middle : middle + 8] = bytes(byte ^ 0xFF for byte in whole[middle : middle + 8])
        return bytes(whole)
    return content.encode()  # not compressed at all
