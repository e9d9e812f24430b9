"""--overwrite replaces what a training run has written, and nothing else."""

import shutil

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset
from transformers import TrainingArguments

from run_scripts import finetune
from run_scripts.shared import output_dir
from run_scripts.shared.output_dir import MARKER


@pytest.fixture
def words(backbone_path, tmp_path):
    Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}).to_csv(tmp_path / "pairs.csv")
    flags = {"--model_name_or_path": backbone_path("bert"), "--train_file": str(tmp_path / "pairs.csv")}
    flags |= {"--output_dir": str(tmp_path / "out"), "--max_steps": "1", "--per_device_train_batch_size": "4"}
    flags |= {"--bf16": "false", "--use_cpu": "true", "--report_to": "none", "--max_eval_samples": "0"}

    def join(**changed):
        changed = {f"--{name}": str(value) for name, value in changed.items()}
        return ["--sizes", *LADDER, *(word for pair in (flags | changed).items() for word in pair)]

    return join


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words, folder, capsys, message):
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        finetune.main(words)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line
    assert contents(folder) == before
    assert not [path for path in folder.parent.iterdir() if "previous" in path.name]


def test_other_peoples_files_are_not_replaced(words, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    refused(words(overwrite=True), out, capsys, "out was not written by a training run of this project")
    # another project's run: transformers' own arguments
    torch.save(TrainingArguments(output_dir=str(out), use_cpu=True), out / "training_args.bin")
    refused(words(overwrite=True), out, capsys, "out was not written by a training run of this project")
    shutil.rmtree(out)
    finetune.main(words())
    for name in ("thesis.txt", "data.csv", "my.json", "notes", "train.py"):
        (out / name).mkdir() if name == "notes" else (out / name).write_text("mine")
        refused(words(overwrite=True), out, capsys, f"out also has {name}, which no training run has written")
        (out / name).rmdir() if name == "notes" else (out / name).unlink()
    (out / MARKER).unlink()  # an earlier version wrote none
    finetune.main(words(overwrite=True))
    assert (out / MARKER).is_file()
    assert not [path for path in tmp_path.iterdir() if "previous" in path.name]


def test_what_the_new_run_reads_is_not_moved_aside(words, tmp_path, capsys):
    out = tmp_path / "out"
    finetune.main(words())
    (out / "runs").mkdir()
    shutil.copy(tmp_path / "pairs.csv", out / "runs" / "pairs.csv")
    (tmp_path / "link.csv").symlink_to(out / "runs" / "pairs.csv")
    for changed, message in (
        ({"model_name_or_path": out}, f"model_name_or_path: {out} is inside output_dir"),
        ({"train_file": out / "runs" / "pairs.csv"}, f"train_file: {out}/runs/pairs.csv is inside output_dir"),
        ({"train_file": tmp_path / "link.csv"}, "link.csv is inside output_dir"),
        ({"eval_file": out / "runs" / "pairs.csv"}, "eval_file: "),
        ({"unlabeled_file": out / "runs" / "pairs.csv"}, "unlabeled_file: "),
    ):
        refused(words(overwrite=True, **changed), out, capsys, message)


def test_a_link_to_the_output_folder_stays_one(words, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real")
    finetune.main(words(output_dir=link))
    first = (tmp_path / "disk" / "real" / "model.safetensors").read_bytes()
    finetune.main(words(output_dir=link, overwrite=True, max_steps=3))
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real" / "model.safetensors").read_bytes() != first
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"], "the earlier run was deleted"


def test_earlier_runs_of_one_second_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir.time, "strftime", lambda form: "20260101-000000")
    folder, kept = tmp_path / "out", []
    for number in range(3):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(str(number))
        kept.append(output_dir.move_aside(str(folder)))
    stem = f"{folder}.previous-20260101-000000"
    assert kept == [stem, f"{stem}-2", f"{stem}-3"]
    assert [(tmp_path / name / "config.json").read_text() for name in kept] == ["0", "1", "2"]
