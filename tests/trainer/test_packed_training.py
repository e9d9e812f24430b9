"""Training on packed rows, which GPUs do, gives on a CPU what training on padded ones gives."""

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, preparation
from trainer.data import PairCollator

ROWS = Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]})


def train(model, tmp_path, monkeypatch, packed: bool, **kwargs):
    monkeypatch.setattr(preparation, "runs_packed", lambda *_: packed)
    settings = {"per_device_train_batch_size": 5, "num_train_epochs": 2, "learning_rate": 0.1, "bf16": False}
    # Adam would blow up the rounding of gradients that are zero, as those of the keys' biases.
    settings |= {"save_strategy": "no", "report_to": "none", "dropout": False, "optim": "sgd"}
    trainer = TwoDMSETrainer(
        model, TwoDMSETrainingArguments(str(tmp_path), **(settings | kwargs)), train_dataset=ROWS,
        unlabeled_texts=SENTENCES,
    )  # fmt: skip
    assert trainer.data_collator.packed == packed
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize(
    "extra", [{}, {"teacher": "start", "exit_projections": True}, {"gradient_checkpointing": True}]
)
def test_packed_equals_padded(family, extra, tiny_model, tmp_path, monkeypatch):
    start = {name: value.clone() for name, value in tiny_model(family).named_parameters()}
    weights = []
    for packed in (False, True):
        model = tiny_model(family)
        train(model, tmp_path / str(packed), monkeypatch, packed, **extra)
        weights.append(dict(model.named_parameters()))
    padded, found = weights
    assert max((padded[name] - value).abs().max() for name, value in start.items()) > 5e-3
    for name, value in padded.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_collator_that_remembers_gives_the_same_batches(tokenizer, monkeypatch):
    from trainer import data

    columns = ["anchor", "positive"]
    usual, kept = (PairCollator(tokenizer, columns, 16, remember=remember) for remember in (False, True))
    calls = []
    tokenize = data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *args: (calls.append(len(args[1])), tokenize(*args))[1])
    for rows in (range(4), range(2, 6), range(4)):
        examples = [ROWS[row] for row in rows]
        expected, found = usual(examples), kept(examples)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "attention_mask"))
        assert found["lengths"] == expected["lengths"]
    assert calls == [8, 8, 8, 4, 8], "the second collator tokenizes each text once"
