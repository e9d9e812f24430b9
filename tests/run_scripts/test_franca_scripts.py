"""pretrain_franca.py and evaluate_franca.py as a user runs them, and every wrong input ends in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_vision import SHAPE, tiny_model, write_pictures
from transformers import AutoModel

from modeling_franca import FrancaForPretraining, FrancaModel
from run_scripts import evaluate_franca, pretrain_franca
from run_scripts.shared import cli
from trainer.franca.trainer import FrancaTrainingArguments

RECIPES = Path(pretrain_franca.__file__).parent / "recipes"


@pytest.fixture
def settings(tmp_path):
    """The flags of a run that works."""
    return {
        "--backbone_config": [json.dumps({"model_type": "dinov2", **SHAPE})],
        "--nesting_sizes": ["4", "16"],
        "--num_prototypes": ["24"],
        "--head_hidden_size": ["12"],
        "--head_bottleneck_size": ["8"],
        "--train_dir": [str(write_pictures(tmp_path / "train", 6))],
        "--global_crop_size": ["16"],
        "--local_crop_size": ["8"],
        "--local_crops_number": ["1"],
        "--per_device_train_batch_size": ["6"],
        "--max_steps": ["4"],
        "--save_steps": ["2"],
        "--output_dir": [str(tmp_path / "out")],
        "--use_cpu": ["true"],
        "--report_to": ["none"],
        "--disable_tqdm": ["true"],
    }


@pytest.fixture
def evaluation(tmp_path):
    """The flags of an evaluation that works."""
    tiny_model().save_pretrained(tmp_path / "one")
    tiny_model(seed=1).teacher.save_backbone(tmp_path / "two")
    return {
        "--model_name_or_path": [str(tmp_path / "one"), str(tmp_path / "two")],
        "--train_dir": [str(write_pictures(tmp_path / "seen", 8))],
        "--test_dir": [str(write_pictures(tmp_path / "unseen", 5))],
        "--output_dir": [str(tmp_path / "results")],
        "--k": ["3"],
    }


def flags(settings: dict) -> list[str]:
    return [word for name, values in settings.items() for word in (name, *values)]


def test_pretraining_ends_resumes_and_continues(settings, tmp_path, capsys):
    pretrain_franca.main(flags(settings))
    out = tmp_path / "out"
    assert f"--model_name_or_path {out}" in capsys.readouterr().out
    first = FrancaForPretraining.from_pretrained(out)
    assert first.config.nesting_sizes == [4, 16]
    plain = AutoModel.from_pretrained(out / "backbone")
    pairs = zip(plain.parameters(), first.teacher.backbone.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 16}
    again = settings | {"--resume_from_checkpoint": [str(out / "checkpoint-2")]}
    pretrain_franca.main(flags(again | {"--output_dir": [str(tmp_path / "again")]}))
    resumed = FrancaForPretraining.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), resumed.parameters(), strict=True))
    kept = {name: value for name, value in settings.items() if not name.startswith(("--head", "--nest", "--num"))}
    del kept["--backbone_config"]
    for source, name in ((out, "more"), (out / "backbone", "new")):
        more = kept | {"--model_name_or_path": [str(source)], "--output_dir": [str(tmp_path / name)]}
        if name == "new":
            more |= {key: settings[key] for key in ("--nesting_sizes", "--num_prototypes")}
        pretrain_franca.main(flags(more))
        trained = FrancaForPretraining.from_pretrained(tmp_path / name)
        assert not torch.equal(trained.student.backbone.layernorm.weight, first.student.backbone.layernorm.weight)


def test_evaluation(evaluation, tmp_path, capsys):
    more = {"--random_init": ["true"], "--save_rasa": ["true"], "--rasa_images": ["10"]}
    evaluate_franca.main(flags(evaluation | more))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert (results["n_train"], results["n_test"]) == (16, 10)
    assert list(results["knn"]) == ["one", "two", "random"]
    assert {*results["knn"]["one"]} == {"1", "2", "4", "8", "16"}, "a plain backbone has Franca's default sizes"
    for table in (results["knn"]["two"], results["position_r2"]["random"]):
        for value in table.values():
            assert f"{value:.4f}" in printed
    assert all(score["after"] < score["before"] for score in results["position_r2"].values())
    assert (tmp_path / "results" / "pca.png").read_bytes().startswith(b"\x89PNG")
    assert FrancaModel.from_pretrained(tmp_path / "results" / "rasa").config.rasa
    with pytest.raises(SystemExit, match="2"):
        evaluate_franca.main(flags(evaluation))
    assert "has results; choose another folder or pass --overwrite" in capsys.readouterr().err


def test_evaluation_tells_colours_apart(evaluation, tmp_path):
    evaluate_franca.main(flags(evaluation | {"--rasa_images": ["0"], "--sizes": ["16"]}))
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["knn"]["one"]["16"] > 0.8
    assert "position_r2" not in results


WRONG_TRAINING = {
    "no pictures": ({"--train_dir": ["./absent"]}, "train_dir: ./absent is not a folder"),
    "no backbone": ({"--backbone_config": ["{"]}, "backbone_config: { is not JSON"),
    "no family": ({"--backbone_config": ["[1]"]}, 'backbone_config: [1] must be like {"model_type": "dinov2"'),
    "an unknown family": (
        {"--backbone_config": ['{"model_type": "x"}']},
        "backbone_config: Unrecognized model",
    ),
    "a word for a number": (
        {"--backbone_config": ['{"model_type": "dinov2", "hidden_size": "wide"}']},
        "backbone_config: Validation error for field 'hidden_size'",
    ),
    "two backbones": ({"--model_name_or_path": ["m"]}, "model_name_or_path: name the backbone with either"),
    "temperature": ({"--student_temperature": ["0"]}, "student_temperature: 0.0 is not allowed"),
    "momentum": ({"--momentum": ["1.5"]}, "momentum: 1.5 is not allowed; use a number from 0 to 1"),
    "prototypes": ({"--num_prototypes": ["4"]}, "num_prototypes: 4 leaves 1 for size 4 of 16"),
    "sizes": ({"--nesting_sizes": ["4", "32"]}, "nesting_sizes: [4, 32] is not allowed"),
    "mask": ({"--mask_ratio": ["1"]}, "mask_ratio: 1.0 is not allowed"),
    "crop": ({"--global_crop_size": ["15"]}, "global_crop_size: 15 is not allowed; use a multiple of the patch size 4"),
    "batch of 1": ({"--per_device_train_batch_size": ["1"]}, "koleo_weight: a batch of 1 has no nearest neighbour"),
    "large batch": ({"--per_device_train_batch_size": ["99"]}, "a step takes 99 images, but there are 12"),
}


def check_one_line(main, arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in lines) == 1
    assert message in lines[-1]


@pytest.mark.parametrize("name", WRONG_TRAINING)
def test_wrong_training_input_ends_in_one_line(name, settings, tmp_path, capsys):
    change, message = WRONG_TRAINING[name]
    check_one_line(pretrain_franca.main, flags(settings | change), message, capsys)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_has_its_own_settings(settings, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "made")
    del settings["--backbone_config"]
    settings["--model_name_or_path"] = [str(tmp_path / "made")]
    check_one_line(pretrain_franca.main, flags(settings), "has its own settings; leave --nesting_sizes out", capsys)


WRONG_EVALUATION = {
    "size": ({"--sizes": ["4", "17"]}, "sizes: [4, 17] is not allowed; use whole numbers from 1 to 16"),
    "neighbours": ({"--k": ["0"]}, "k: 0 is not allowed; use a whole number from 1"),
    "method": ({"--rasa_method": ["x"]}, "rasa_method: 'x' is unknown; choose one of gradient, ridge, covariance"),
    "nothing to save": ({"--rasa_images": ["0"], "--save_rasa": ["true"]}, "save_rasa: there is nothing to fold in"),
    "no model": ({"--model_name_or_path": ["./absent"]}, "model_name_or_path: ./absent does not exist"),
    "no test": ({"--test_dir": ["./absent"]}, "test_dir: ./absent is not a folder"),
    "both": ({"--dataset_name": ["x/y"]}, "train_dir: name the images with either --train_dir or --dataset_name"),
}


@pytest.mark.parametrize("name", WRONG_EVALUATION)
def test_wrong_evaluation_input_ends_in_one_line(name, evaluation, tmp_path, capsys):
    change, message = WRONG_EVALUATION[name]
    check_one_line(evaluate_franca.main, flags(evaluation | change), message, capsys)
    assert not (tmp_path / "results").exists()


def test_folders_that_do_not_fit_are_refused(evaluation, tmp_path, capsys):
    same = evaluation | {"--model_name_or_path": [str(tmp_path / "one")] * 2}
    check_one_line(evaluate_franca.main, flags(same), "model_name_or_path: one, one must differ", capsys)
    (tmp_path / "unseen" / "green").mkdir()
    (tmp_path / "unseen" / "blue" / "0.png").rename(tmp_path / "unseen" / "green" / "0.png")
    message = "test_dir: its classes are not those of train_dir"
    check_one_line(evaluate_franca.main, flags(evaluation), message, capsys)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    change = {"--train_dir": [str(tmp_path / "texts")]}
    check_one_line(evaluate_franca.main, flags(evaluation | change), "train_dir: ", capsys)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("franca-*.yaml")), ids=lambda p: p.name)
def test_recipes_are_understood(path, tmp_path):
    kinds = (
        pretrain_franca.ModelArguments, pretrain_franca.FrancaSettings, pretrain_franca.DataArguments,
        FrancaTrainingArguments,
    )  # fmt: skip
    model, settings, _, args = cli.Parser(kinds).parse([str(path), "--output_dir", str(tmp_path)])
    recipe = yaml.safe_load(path.read_text())
    assert json.loads(model.backbone_config) == recipe["backbone_config"]
    assert settings.nesting_sizes == recipe["nesting_sizes"]
    assert args.learning_rate == recipe["learning_rate"]
