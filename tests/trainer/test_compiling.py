"""`torch_compile`: few compilations, and the losses of a model that is not compiled."""

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset
from torch._dynamo.utils import counters

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """transformers' arguments tell accelerate through the environment what to compile."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model, folder, steps, **options):
    texts = [" ".join([text] * (1 + number % 4)) for number, text in enumerate(SENTENCES * 4)]
    rows = Dataset.from_dict({"anchor": texts[::2], "positive": texts[1::2]})
    settings = {"max_steps": steps, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    args = TwoDMSETrainingArguments(
        str(folder), bf16=False, use_cpu=True, logging_steps=1, dropout=False, seed=1, **(settings | options)
    )
    trainer = TwoDMSETrainer(model, args, train_dataset=rows)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def test_twenty_steps_compile_few_times(tiny_model, tmp_path):
    _, expected = train(tiny_model(), tmp_path, 20)
    assert compilations() == 0
    model = tiny_model()
    names = list(model.state_dict())
    trainer, losses = train(model, tmp_path, 20, torch_compile=True, torch_compile_backend="aot_eager")
    assert 1 <= compilations() <= 4
    assert not counters["graph_break"]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len(losses) == 20
    assert list(model.state_dict()) == names
    assert trainer.encoder.encode(["a text"]).shape == (1, 32), "the compiled layers also encode"
