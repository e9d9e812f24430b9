"""Averaging the trained weights with the initial weights, layer by layer."""

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.averaging import initial_shares

ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})


def train(model, folder, **kwargs) -> TwoDMSETrainer:
    args = TwoDMSETrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, sizes=LADDER, **kwargs,
    )  # fmt: skip
    trainer = TwoDMSETrainer(model=model, args=args, train_dataset=ROWS)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("family", "by_layer", "shares"),
    [
        ("bert", "linear", [0.0, 0.2, 0.4, 0.6]),
        ("modernbert", "linear", [0.0, 0.2, 0.4, 0.6]),
        ("qwen3", "step", [0.0, 0.6, 0.6, 0.6]),
    ],
)
def test_each_layer_keeps_its_share_of_the_initial_weights(family, by_layer, shares, tiny_model, tmp_path):
    start = {name: value.clone() for name, value in tiny_model(family).state_dict().items()}
    plain, averaged = tiny_model(family), tiny_model(family)
    train(plain, tmp_path / "plain")
    trainer = train(averaged, tmp_path / "averaged", initial_share=0.6, initial_share_by_layer=by_layer)
    stack, norm, moved = plain.config.layer_stack, plain.config.final_norm, set()
    for name, value in averaged.named_parameters():
        share = 0.0
        for index in range(4):
            if f".{stack}.{index}." in name:
                share = shares[index]
        if norm and f".{norm}." in name:
            share = 0.6
        trained = dict(plain.named_parameters())[name]
        torch.testing.assert_close(value, share * start[name] + (1 - share) * trained, atol=1e-7, rtol=1e-5)
        if share and not torch.equal(trained, start[name]):
            moved.add(share)
    assert moved == {share for share in shares if share}, "the comparison must not be empty"
    assert trainer.describe()["initial share"] == 0.6


def test_a_share_of_1_keeps_the_initial_last_layer(tiny_model, tmp_path):
    model = tiny_model()
    before = model.backbone.encoder.layer[3].output.dense.weight.clone()
    train(model, tmp_path, initial_share=1.0)
    torch.testing.assert_close(model.backbone.encoder.layer[3].output.dense.weight, before)


def test_a_share_that_rises_is_0_in_a_model_of_one_layer(tiny_model):
    assert set(initial_shares(tiny_model().truncate(1), 0.5).values()) == {0.0}


@pytest.mark.parametrize(
    ("ladder", "expected"), [(["2x16", "4x32"], [0.0, 0.0, 0.5, 0.5]), (["4x16", "4x32"], [0.5, 0.5, 0.5, 0.5])]
)
def test_a_step_leaves_the_layers_of_a_shallow_smallest_size_as_trained(ladder, expected, tiny_model):
    model = tiny_model()
    model.config.set_ladder(ladder)
    shares = initial_shares(model, 0.5, "step")
    by_layer = {int(name.split(".")[3]): share for name, share in shares.items() if ".layer." in name}
    assert by_layer == dict(enumerate(expected))
    assert {share for name, share in shares.items() if ".embeddings." in name} == {0.0}


def test_averages_that_are_not_possible_are_refused(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"initial_share: -0\.1 is not allowed"):
        TwoDMSETrainingArguments(output_dir=str(tmp_path), initial_share=-0.1)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="initial_share: the average needs all weights in one process"):
        train(adapted, tmp_path, initial_share=0.5)
