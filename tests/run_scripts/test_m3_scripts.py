"""digits_m3.py, train_m3.py and evaluate_m3.py: from nothing to a table, and the input that they refuse."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor
from run_scripts import digits_m3 as digits
from run_scripts import evaluate_m3, train_m3
from run_scripts.shared import cli
from trainer.m3.trainer import M3TrainingArguments

RECIPE = cli.RECIPES / "m3-digits.yaml"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The output of digits_m3.py, with few rows."""
    folder = tmp_path_factory.mktemp("task")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", {"train": 24, "valid": 7, "test": 9})
        digits.main(["--output_dir", str(folder / "digits")])
    return folder / "digits"


@pytest.fixture
def settings(task, tmp_path):
    return {
        "--model_name_or_path": [str(task / "model")],
        "--train_file": [str(task / "train.parquet")],
        "--eval_file": [str(task / "valid.parquet")],
        "--output_dir": [str(tmp_path / "out")],
        "--max_steps": ["3"],
        "--per_device_train_batch_size": ["4"],
        "--save_strategy": ["steps"],
        "--save_steps": ["2"],
        "--logging_steps": ["1"],
        "--eval_strategy": ["no"],
        "--bf16": ["false"],
        "--use_cpu": ["true"],
        "--report_to": ["none"],
        "--disable_tqdm": ["true"],
    }


def run(settings: dict) -> None:
    train_m3.main([word for name, values in settings.items() for word in (name, *values)])


def evaluate(model, task, out, *flags: str) -> dict:
    files = ["--data_file", str(task / "test.parquet"), "--output_dir", str(out)]
    evaluate_m3.main(["--model_name_or_path", str(model), *files, *flags])
    return json.loads((out / "results.json").read_text())


def test_from_nothing_to_a_table(settings, task, tmp_path, capsys):
    run(settings | {"--scale_loss_weights": ["1", "1", "2"], "--default_visual_tokens": ["9"]})
    printed, out = capsys.readouterr().out, tmp_path / "out"
    metrics = json.loads((out / "results.json").read_text())
    assert f"    9 visual tokens: accuracy {metrics['eval_accuracy_9']:.4f}" in printed
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss/36" in entry] == [1, 2, 3]
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model) is MatryoshkaLlavaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(out)) is MatryoshkaLlavaProcessor
    assert model.config.level_shares == {1: 0.25, 9: 0.25, 36: 0.5}
    assert model.config.default_visual_tokens == 9
    results = evaluate(out, task, tmp_path / "scores", "--cascade_threshold", "0.5", "--batch_size", "4")
    table = results["levels"]
    assert list(table) == ["1", "9", "36", "oracle", "cascade"]
    assert results["n"] == 9
    assert table["oracle"]["accuracy"] >= max(table[size]["accuracy"] for size in ("1", "9", "36"))
    assert [table[size]["sequence_length"] for size in ("1", "9", "36")] == [10, 18, 45]
    printed = capsys.readouterr().out
    assert "| cascade (extension) |" in printed
    assert f"| 9 | {table['9']['accuracy']:.4f} | {table['9']['loss']:.4f} | 9.0 | 18.0 |" in printed


def test_every_weight_learns_and_a_frozen_tower_does_not(settings, task, tmp_path):
    start = MatryoshkaLlavaForConditionalGeneration.from_pretrained(task / "model").state_dict()
    for frozen in ("false", "true"):
        run(settings | {"--freeze_vision_tower": [frozen], "--output_dir": [str(tmp_path / frozen)]})
        trained = MatryoshkaLlavaForConditionalGeneration.from_pretrained(tmp_path / frozen).state_dict()
        same = {name for name in start if torch.equal(start[name], trained[name])}
        # LLaVA reads the last but one layer of the tower: what comes after it takes no part.
        unread = {name for name in start if "vision_tower.encoder.layers.1" in name or "post_layernorm" in name}
        tower = {name for name in start if "vision_tower" in name}
        assert same == (tower if frozen == "true" else unread)


def test_resumes_from_a_checkpoint(settings, tmp_path):
    run(settings)
    first = MatryoshkaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    (tmp_path / "out" / "model.safetensors").unlink()
    run(settings | {"--resume_from_checkpoint": [str(tmp_path / "out" / "checkpoint-2")]})
    again = MatryoshkaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_stock_llava_is_scored_too(task, tmp_path):
    sizes = ["--visual_token_sizes", "36", "4"]
    table = evaluate(task / "model", task, tmp_path / "scores", *sizes)["levels"]
    assert list(table) == ["4", "36", "oracle"]


TRAINING = {
    "no rows": ({"--train_file": []}, "expected one argument"),
    "no such file": ({"--train_file": ["absent.json"]}, "train_file: absent.json is not a file"),
    "levels": ({"--visual_token_sizes": ["4", "9"]}, "visual_token_sizes: 4 and 9 do not nest"),
    "position": ({"--pool_position": ["inside"]}, "pool_position: 'inside' is unknown"),
    "default": ({"--default_visual_tokens": ["5"]}, "default_visual_tokens: 5 is not allowed"),
    "weights": ({"--scale_loss_weights": ["1"]}, "scale_loss_weights: there are 1 for 3 visual_token_sizes"),
    "no model": ({"--model_name_or_path": ["./absent"]}, "model_name_or_path: ./absent does not exist"),
    "length": ({"--max_length": ["8"]}, "max_length: no answer of the batch lies within 8 tokens"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_refuses_in_one_line(name, settings, tmp_path, capsys):
    change, message = TRAINING[name]
    with pytest.raises(SystemExit) as stopped:
        run(settings | change)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in lines) == 1
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_another_kind_of_model_and_lost_weights_are_refused(settings, backbone_path, task, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(settings | {"--model_name_or_path": [backbone_path("bert")]})
    assert "is a bert model; use one of type llava or matryoshka_llava" in capsys.readouterr().err
    model = MatryoshkaLlavaForConditionalGeneration.from_pretrained(task / "model")
    state = {name: value for name, value in model.state_dict().items() if "projector" not in name}
    model.save_pretrained(tmp_path / "lost", state_dict=state)
    with pytest.raises(SystemExit, match="2"):
        run(settings | {"--model_name_or_path": [str(tmp_path / "lost")]})
    assert "lost lack 4 tensors, for example model.multi_modal_projector.linear_1.bias" in capsys.readouterr().err


EVALUATION = {
    "batch": (["--batch_size", "0"], "batch_size: 0 is not allowed; use a whole number from 1"),
    "threshold": (["--cascade_threshold", "1.5"], "cascade_threshold: 1.5 is not allowed; use a probability up to 1"),
    "levels": (["--visual_token_sizes", "5"], "visual_token_sizes: 5 is not allowed"),
    "file": (["--data_file", "absent.parquet"], "data_file: absent.parquet is not a file"),
}


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_refuses_in_one_line(name, task, tmp_path, capsys):
    flags, message = EVALUATION[name]
    with pytest.raises(SystemExit, match="2"):
        evaluate(task / "model", task, tmp_path / "out", *flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(settings, task, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("precious")
    for call in (
        lambda: evaluate(task / "model", task, out),
        lambda: run(settings),
        lambda: digits.main(["--output_dir", str(task)]),
    ):
        with pytest.raises(SystemExit, match="2"):
            call()
        assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    assert (out / "results.json").read_text() == "precious"


def test_the_recipe_is_understood(tmp_path):
    parser = cli.Parser((train_m3.ModelArguments, train_m3.DataArguments, M3TrainingArguments))
    model, data, args = parser.parse([str(RECIPE), "--output_dir", str(tmp_path), "--bf16", "false"])
    recipe = yaml.safe_load(RECIPE.read_text())
    assert args.visual_token_sizes == recipe["visual_token_sizes"]
    assert args.learning_rate == recipe["learning_rate"]
    assert (model.model_name_or_path, data.train_file) == (recipe["model_name_or_path"], recipe["train_file"])
