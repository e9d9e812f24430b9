"""Nothing is lost: kills at random moments, signals, a full disk, incomplete checkpoints."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import LADDER, LEAVE, SENTENCES, Signal, cpu_environment
from datasets import Dataset
from forking import ForkedScript, finish, kill, start_group
from safetensors.torch import load_file
from transformers import TrainerCallback

from run_scripts import finetune
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.shared.checkpoints import STAGING, SaveError, find_checkpoint, find_problem

ROOT = Path(__file__).resolve().parents[3]
PAIRS = {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}
STEPS = 22


def make_trainer(model, folder, evaluation=None, **kwargs) -> TwoDMSETrainer:
    defaults = {
        "output_dir": str(folder),
        "sizes": LADDER,
        "objective": "2dmse",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    args = TwoDMSETrainingArguments(**(defaults | kwargs))
    return TwoDMSETrainer(model=model, args=args, train_dataset=Dataset.from_dict(PAIRS), eval_dataset=evaluation)


def train_in_a_process(start: str, folder: str) -> None:
    """The run that the tests kill: it resumes the newest complete checkpoint, and is slow enough to be hit."""
    from modeling_2dmse import TwoDMSEModel

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                print("step", state.global_step, flush=True)
            time.sleep(0.02)

    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(TwoDMSEModel.from_pretrained(start), folder, per_device_train_batch_size=batch)
    trainer.add_callback(Slow())
    trainer.train(resume_from_checkpoint=find_checkpoint(folder, trainer.args.world_size))
    trainer.save_model()


def launch(tmp_path, folder, processes: int) -> list[ForkedScript]:
    call = f"t.train_in_a_process({str(tmp_path / 'start')!r}, {str(folder)!r})"
    script = tmp_path / f"run-{time.monotonic_ns()}.py"
    script.write_text(f"import test_checkpoints as t; {call}{LEAVE}")
    environment = cpu_environment(ROOT, ROOT / "tests", Path(__file__).parent)
    if processes > 1:
        return start_group(script, [], environment, processes)
    return [ForkedScript(script, [], environment, script.with_suffix(".log"))]


@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 4)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(processes, kills, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    finish(launch(tmp_path, tmp_path / "whole", processes))
    rng, cut_while_writing = random.Random(processes), 0
    for attempt in range(kills):
        group = launch(tmp_path, tmp_path / "killed", processes)
        staging = tmp_path / "killed" / STAGING
        target = rng.randint(3, 4)  # steps of these processes before they are killed
        while group[0].output().count("step ") < target and group[0].poll() is None:
            time.sleep(0.001)
        if attempt % 2:  # these are killed while a checkpoint is written
            while not staging.exists() and group[0].poll() is None:
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.01)
            cut_while_writing += staging.exists()
        else:
            time.sleep(rng.random() * 0.05)
        kill(group)
        newest = find_checkpoint(str(tmp_path / "killed"))
        assert newest is None or find_problem(newest) is None
    assert cut_while_writing, "no process was killed while it wrote a checkpoint"
    last = finish(launch(tmp_path, tmp_path / "killed", processes))
    assert int(last[0].split("step ")[1].split()[0]) > 1, "it resumed, and did not start again"
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert any(not torch.equal(one[name], start[name]) for name in one)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def pairs_file(tmp_path):
    Dataset.from_dict({name: values * 4 for name, values in PAIRS.items()}).to_csv(tmp_path / "pairs.csv", index=False)
    return str(tmp_path / "pairs.csv")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_writes_a_checkpoint_and_prints_how_to_resume(number, tiny_model, tmp_path, pairs_file):
    tiny_model().save_pretrained(tmp_path / "start")
    flags = ["--model_name_or_path", str(tmp_path / "start"), "--train_file", pairs_file, "--max_steps", "5000"]
    flags += ["--output_dir", str(tmp_path / "out"), "--bf16", "false", "--use_cpu", "true", "--max_eval_samples", "0"]
    flags += ["--per_device_train_batch_size", "4", "--logging_steps", "1"]
    script = ROOT / "run_scripts" / "finetune.py"
    process = ForkedScript(script, flags, cpu_environment(ROOT), tmp_path / "finetune.log")
    while "'loss'" not in process.output() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == 128 + number, process.output()[-2000:]
    output = process.output()
    assert f"Stopped by {number.name} after step" in output
    assert "--resume_from_checkpoint true" in output
    step = int(output.split("after step ")[1].split(";")[0])
    assert find_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / f"checkpoint-{step}")
    finetune.main([*flags, "--max_steps", str(step + 1), "--resume_from_checkpoint", "true"])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_program_does_not_go_on_with_a_model_whose_training_was_stopped(number, error, tiny_model, tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=4, initial_share=0.5)
    callback = Signal(number)
    trainer.add_callback(callback)
    with pytest.raises(error) as stopped:
        trainer.train()
    assert trainer.state.global_step == 2
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    if error is SystemExit:
        assert stopped.value.code == 128 + number
    trainer.remove_callback(callback)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_gives_one_line_and_keeps_the_previous_checkpoint(part, tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model(), tmp_path)
    trainer.train()
    kept = find_checkpoint(str(tmp_path))
    name = {"model": "_save", "optimizer": "_save_optimizer_and_scheduler"}[part]
    monkeypatch.setattr(trainer, name, _full)
    trainer.state.global_step += 1
    message = r"checkpoint-23 could not be written to .*: no space is left on the disk; checkpoint-22 is intact"
    with pytest.raises(SaveError, match=message):
        trainer._save_checkpoint(trainer.model, None)
    assert find_checkpoint(str(tmp_path)) == kept
    assert not (tmp_path / STAGING).exists()


def test_a_file_system_that_is_really_full(tiny_model, tmp_path, pairs_file, capsys):
    """The first checkpoint fits on the file system, the second does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted on this machine")
    try:
        tiny_model().save_pretrained(tmp_path / "start")
        flags = ["--model_name_or_path", str(tmp_path / "start"), "--train_file", pairs_file, "--max_steps", "4"]
        flags += ["--output_dir", str(disk / "out"), "--bf16", "false", "--use_cpu", "true", "--max_eval_samples", "0"]
        flags += ["--per_device_train_batch_size", "4", "--save_steps", "1", "--disable_tqdm", "true"]
        with pytest.raises(SystemExit, match="2"):
            finetune.main(flags)
        line = capsys.readouterr().err.splitlines()[-1]
        assert "no space is left on the disk; checkpoint-1 is intact" in line
        assert find_checkpoint(str(disk / "out")) == str(disk / "out" / "checkpoint-1")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # one of its files may still be mapped


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_an_incomplete_checkpoint_is_skipped_with_a_warning(name, damage, finished_run, tmp_path, caplog):
    shutil.copytree(finished_run, tmp_path / "out")
    assert find_checkpoint(str(tmp_path / "out")).endswith("checkpoint-22")
    path = tmp_path / "out" / "checkpoint-22" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level("WARNING"):
        found = find_checkpoint(str(tmp_path / "out"))
    assert found.endswith("checkpoint-20")
    assert find_problem(str(tmp_path / "out" / "checkpoint-22")) is not None
    assert find_problem(found, world_size=2) == "it has the random states of 1 processes"


@pytest.fixture(scope="module")
def finished_run(backbone_path, tmp_path_factory):
    from modeling_2dmse import TwoDMSEModel

    folder = tmp_path_factory.mktemp("finished")
    make_trainer(TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=LADDER), folder).train()
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-22"}
    return folder


def test_the_best_checkpoint_is_kept_and_named_by_its_own_path(tiny_model, tmp_path):
    scored = Dataset.from_dict(
        {"sentence1": SENTENCES[::2], "sentence2": SENTENCES[1::2], "score": [0.1 * i for i in range(10)]}
    )
    args = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(tiny_model(), tmp_path, scored, learning_rate=5e-3, **args)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_metric"] == trainer.state.best_metric
    assert STAGING not in json.dumps(state)
