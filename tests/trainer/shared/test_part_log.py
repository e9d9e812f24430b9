"""The parts of a loss: means in the log, and losses that are not finite, with and without waiting for a device."""

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.shared import part_log

ROWS = Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]})


def make_trainer(model, tmp_path, **kwargs):
    settings = {"max_steps": 4, "per_device_train_batch_size": 5, "save_strategy": "no", "report_to": "none"}
    args = TwoDMSETrainingArguments(str(tmp_path), logging_steps=2, bf16=False, **(settings | kwargs))
    return TwoDMSETrainer(model, args, train_dataset=ROWS)


@pytest.fixture
def late(monkeypatch):
    """Copies to the host arrive only when they are waited for, as those of a slow GPU; returns how often that was."""
    waits = []

    def copy(values):
        def arrived(wait):
            waits.extend([True] if wait else [])
            return wait

        return values.clone(), arrived

    monkeypatch.setattr(part_log, "copy_to_host", copy)
    return waits


def test_a_step_does_not_wait_and_the_log_is_the_same(tiny_model, tmp_path, monkeypatch, late):
    torch.manual_seed(0)
    trainer = make_trainer(tiny_model(), tmp_path / "late", dropout=False)
    seen = []
    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda *args: (step(*args), seen.append(len(late)))[0])
    trainer.train()
    assert seen == [0, 0, 2, 2], "two steps are waited for at the log entry after them, none before"
    monkeypatch.undo()
    usual = make_trainer(tiny_model(), tmp_path / "usual", dropout=False)
    usual.train()
    logs = [[entry for entry in t.state.log_history if "loss/2x16" in entry] for t in (trainer, usual)]
    assert len(logs[0]) == 2
    for found, expected in zip(*logs, strict=True):
        assert {name: value for name, value in found.items() if "/" in name} == {
            name: value for name, value in expected.items() if "/" in name
        }


def test_a_late_loss_that_is_not_finite_names_its_step(tiny_model, tmp_path, late):
    model = tiny_model()
    with torch.no_grad():
        model.backbone.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step 1, from loss/2x16, loss/4x32"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_no_checkpoint_follows_a_loss_that_is_not_finite(tiny_model, tmp_path, late):
    model = tiny_model()
    with torch.no_grad():
        model.backbone.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    trainer = make_trainer(model, tmp_path, save_strategy="steps", save_steps=1, logging_strategy="no")
    with pytest.raises(FloatingPointError, match="in step 1"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
