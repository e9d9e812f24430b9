"""A learning rate for each layer."""

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments

ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})


def make(model, folder, **kwargs) -> TwoDMSETrainer:
    args = TwoDMSETrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", sizes=LADDER,
        use_cpu=True, bf16=False, disable_tqdm=True, eval_strategy="no", **{"max_steps": 4} | kwargs,
    )  # fmt: skip
    return TwoDMSETrainer(model=model, args=args, train_dataset=ROWS)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_rates_fall_from_the_first_layer_to_the_last(family, tiny_model, tmp_path):
    model = tiny_model(family)
    model.add_exit_projections()
    trainer = make(model, tmp_path, last_layer_lr_ratio=1 / 8, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    given = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(given) == len([*model.parameters()])
    for name, parameter in model.named_parameters():
        below = next((int(word) for word in name.split(".") if word.isdigit()), 0)  # of 4 layers
        below = 3 if model.config.final_norm and f".{model.config.final_norm}." in name else below
        assert given[id(parameter)]["lr"] == pytest.approx(1e-2 * 0.5**below), name
    kept = make(tiny_model(family), tmp_path, weight_decay=0.1).create_optimizer().param_groups
    assert {group["lr"] for group in kept} == {1e-2}
    assert {group["weight_decay"] for group in groups} == {group["weight_decay"] for group in kept} == {0.0, 0.1}


def test_the_first_step_moves_each_layer_by_its_rate(tiny_model, tmp_path):
    model = tiny_model("bert")
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    make(model, tmp_path, last_layer_lr_ratio=1 / 8, max_steps=1, warmup_steps=0, save_strategy="no").train()
    for below in range(4):
        name = f"backbone.encoder.layer.{below}.output.dense.weight"
        moved = (dict(model.named_parameters())[name] - start[name]).abs().max()
        assert moved.item() == pytest.approx(1e-2 * 0.5**below, rel=1e-2)  # Adam's first step is its rate


def test_a_resumed_run_has_the_same_rates(tiny_model, tmp_path):
    whole, cut = tiny_model("bert"), tiny_model("bert")
    make(whole, tmp_path / "whole", last_layer_lr_ratio=0.1, save_strategy="no").train()
    first = make(cut, tmp_path / "cut", last_layer_lr_ratio=0.1, save_steps=2)
    first.train()
    other = make(tiny_model("bert"), tmp_path / "cut", last_layer_lr_ratio=0.1, save_steps=2)
    other.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for (name, one), two in zip(whole.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0, msg=name)


def test_training_again_does_not_lower_the_rates_again(tiny_model, tmp_path):
    trainer = make(tiny_model("bert"), tmp_path, last_layer_lr_ratio=0.5, save_strategy="no", max_steps=1)
    trainer.train()
    before = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == before


def test_what_is_no_ratio_is_refused(tmp_path):
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="last_layer_lr_ratio"):
            TwoDMSETrainingArguments(output_dir=str(tmp_path), last_layer_lr_ratio=wrong)
