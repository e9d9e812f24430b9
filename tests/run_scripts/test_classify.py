"""classify.py as a user runs it: train, fit-cascade, eval on texts and images; wrong input ends in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import HIDDEN, SENTENCES
from datasets import Dataset
from PIL import Image
from transformers import pipeline

from modeling_mrl import MatryoshkaForImageClassification, MatryoshkaForSequenceClassification
from run_scripts import classify
from trainer.mrl.data import leave_out_seen, read_examples
from trainer.mrl.trainer import oracle

SIZES = ["1x8", "2x4", "4x32"]


def write_pairs(path, texts) -> None:
    """Two rows per premise, one of each class, which differ in one word."""
    rows = [(text, f"{word} {text}", name) for text in texts for word, name in (("a", "no"), ("the", "yes"))]
    Dataset.from_dict(
        {"premise": [r[0] for r in rows], "hypothesis": [r[1] for r in rows], "label": [r[2] for r in rows]}
    ).to_csv(path, index=False)


@pytest.fixture
def files(tmp_path, backbone_path):
    """Tables whose premises differ, and the flags of a run that works."""
    write_pairs(tmp_path / "train.csv", [f"{text} {more}" for text in SENTENCES for more in ("", "again", "twice")])
    write_pairs(tmp_path / "test.csv", [f"{text} here" for text in SENTENCES])
    return {
        "--model_name_or_path": [backbone_path("bert")],
        "--train_file": [str(tmp_path / "train.csv")],
        "--text_column": ["premise"],
        "--text_pair_column": ["hypothesis"],
        "--sizes": SIZES,
        "--max_steps": ["8"],
        "--per_device_train_batch_size": ["8"],
        "--learning_rate": ["0.003"],
        "--output_dir": [str(tmp_path / "out")],
        "--bf16": ["false"],
        "--use_cpu": ["true"],
        "--disable_tqdm": ["true"],
        "--save_strategy": ["no"],
        "--eval_strategy": ["no"],
    }


def run(command: str, settings: dict) -> None:
    classify.main([command, *(word for name, values in settings.items() for word in (name, *values))])


def test_texts_from_training_to_the_table(files, tmp_path, capsys):
    steps = {"--save_strategy": ["steps"], "--eval_strategy": ["steps"], "--logging_steps": ["2"]}
    run("train", files | steps | {"--label_smoothing_factor": ["0.1"]})
    out, printed = tmp_path / "out", capsys.readouterr().out
    assert "12 rows held out of training" in printed
    assert all(f"{size:<10}" in printed for size in [*SIZES, "oracle"])
    assert {"model.safetensors", "tokenizer.json", "classify.json", "classify_rows.npz", "modeling_mrl.py"} <= {
        path.name for path in out.iterdir()
    }
    log = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert {f"loss/{size}" for size in SIZES} < set(log[0])
    assert sum(log[0][f"loss/{size}"] for size in SIZES) == pytest.approx(log[0]["loss"], abs=1e-3)
    assert any("eval_accuracy_2x4" in entry and "eval_accuracy_mean" in entry for entry in log)
    model = MatryoshkaForSequenceClassification.from_pretrained(out)
    assert (model.config.sizes, model.config.label_smoothing) == (SIZES, 0.1)
    assert model.config.id2label == {0: "no", 1: "yes"}

    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    run("fit-cascade", {"--model_name_or_path": [str(out)], "--fit_file": files["--train_file"]})
    printed = capsys.readouterr().out
    assert "12 rows; 108 were left out, as training has seen them" in printed
    assert "2x4        stops above a confidence of" in printed
    thresholds = json.loads((out / "config.json").read_text())["thresholds"]
    assert len(thresholds) == 2
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {name for name in before if before[name] != after[name]} == {"config.json", "classify_rows.npz"}
    assert json.loads(before["config.json"]) | {"thresholds": thresholds} == json.loads(after["config.json"])

    shutil.move(out, tmp_path / "moved")
    judged = {"--model_name_or_path": [str(tmp_path / "moved")], "--eval_file": [str(tmp_path / "test.csv")]}
    run("eval", judged | {"--output_dir": [str(tmp_path / "r")], "--timing_runs": ["2"], "--batch_size": ["16"]})
    printed = capsys.readouterr().out
    assert "time of the cascade over that of 4x32 alone" in printed
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert (results["n"], results["left_out"], results["time"]["runs"]) == (40, 0, 2)
    assert set(results["accuracy"]) == set(SIZES)
    assert results["oracle"]["accuracy"] >= max(results["accuracy"].values())
    assert results["oracle"]["accuracy"] >= results["cascade"]["accuracy"]
    assert sum(results["cascade"]["share"].values()) == pytest.approx(1)
    assert 1 <= results["cascade"]["mean_layers"] <= 4
    assert (tmp_path / "r" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for name in ("cascade", "oracle"):
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert line.split()[1] == f"{results[name]['accuracy']:.4f}"
    pipe = pipeline("text-classification", str(tmp_path / "moved"), device="cpu")
    assert pipe({"text": "a cat", "text_pair": "the cat"})["label"] in ("no", "yes")


def test_rows_that_were_seen_are_left_out(files, tmp_path, capsys):
    run("train", files)
    folder, train = str(tmp_path / "out"), files["--train_file"][0]
    table = read_examples(train, "x", ["premise", "hypothesis"], "label")
    held, seen = leave_out_seen(table, folder, ["train"], "x")
    assert (len(held), seen) == (12, 108)
    chosen = {tuple(row.values()) for row in held.select_columns(["premise", "hypothesis"])}
    trained = {tuple(row.values()) for row in table.select_columns(["premise", "hypothesis"])} - chosen
    assert not {premise for premise, _ in chosen} & {premise for premise, _ in trained}, "a premise on both sides"
    run("fit-cascade", {"--model_name_or_path": [folder], "--fit_file": [train]})
    capsys.readouterr()
    judged = {"--model_name_or_path": [folder], "--output_dir": [str(tmp_path / "r")]}
    with pytest.raises(SystemExit, match="2"):
        run("eval", judged | {"--eval_file": [train]})
    assert "eval_file: train or fit has seen all 120 rows; name other data" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    both = Dataset.from_csv([train, str(tmp_path / "test.csv")])
    both.to_csv(tmp_path / "both.csv", index=False)
    run("eval", judged | {"--eval_file": [str(tmp_path / "both.csv")]})
    assert "40 rows; 120 were left out, as training or the cascade have seen them" in capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "results.json").read_text())["n"] == 40
    (tmp_path / "out" / "classify_rows.npz").unlink()
    with pytest.raises(SystemExit, match="2"):
        run("eval", judged | {"--eval_file": [str(tmp_path / "both.csv")]})
    assert "out has no classify_rows.npz, so what training has seen is not known" in capsys.readouterr().err


def test_images(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 6)):
        for name, shade in (("dark", 40), ("light", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(shade - 30, shade + 30, (20, 18, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    out = tmp_path / "out"
    run(
        "train",
        {
            "--model_name_or_path": [str(tmp_path / "vit")],
            "--train_file": [str(tmp_path / "train")],
            "--sizes": ["2", "8", "32"],
            "--head_type": ["tied"],
            "--max_steps": ["10"],
            "--learning_rate": ["0.003"],
            "--output_dir": [str(out)],
            **{name: ["true"] for name in ("--use_cpu", "--disable_tqdm")},
            **{name: ["no"] for name in ("--save_strategy", "--eval_strategy")},
        },
    )
    run("fit-cascade", {"--model_name_or_path": [str(out)], "--fit_file": [str(tmp_path / "train")]})
    assert "8 rows; 72 were left out" in capsys.readouterr().out
    judged = {"--model_name_or_path": [str(out)], "--eval_file": [str(tmp_path / "test")]}
    run("eval", judged | {"--output_dir": [str(tmp_path / "r")]})
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["n"] == 12
    assert results["accuracy"]["32"] > 0.9
    assert results["cascade"]["mean_layers"] is None
    assert MatryoshkaForImageClassification.from_pretrained(out).config.id2label == {0: "dark", 1: "light"}


def test_the_oracle():
    correct = torch.tensor([[True, False, False, False], [True, True, False, False], [False, True, True, False]])
    sizes = MatryoshkaForSequenceClassification.config_class(sizes=["1x8", "2x16", "4x32"]).ladder
    best = oracle(correct, sizes)
    assert best["accuracy"] == 0.75
    assert best["expected_dim"] == (8 + 16 + 32 + 8) / 4
    assert best["mean_layers"] == (1 + 2 + 4 + 1) / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--sizes": ["8", "8"]}, "sizes: 8 appears more than once"),
        ({"--sizes": ["5x8"]}, "sizes: 5x8 asks for 5 layers; the backbone has 1 to 4"),
        ({"--loss_weights": ["1", "nan", "1"]}, "loss_weights: [1.0, nan, 1.0] must have only finite numbers"),
        ({"--head_type": ["both"]}, "head_type: 'both' is unknown"),
        ({"--text_column": ["sentence"]}, "has no column sentence; its columns are premise, hypothesis, label"),
        ({"--label_column": ["premise"], "--eval_file": ["TEST"]}, "eval_file: the model has no class"),
        ({"--train_file": ["nowhere.csv"]}, "train_file: nowhere.csv is not a file"),
        ({"--max_eval_samples": ["-1"]}, "max_eval_samples: -1 is not allowed"),
        ({"--max_length": ["2"]}, "max_length: 2 is not allowed"),
        ({"--colour": ["red"]}, "flags: --colour is unknown"),
    ],
)
def test_wrong_training_ends_in_one_line(files, tmp_path, change, message, capsys):
    change = {name: [value.replace("TEST", str(tmp_path / "test.csv")) for value in v] for name, v in change.items()}
    with pytest.raises(SystemExit, match="2"):
        run("train", files | change)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_other_wrong_input(files, tmp_path, backbone_path, capsys):
    run("train", files | {"--max_steps": ["1"]})
    out = str(tmp_path / "out")
    (tmp_path / "one.csv").write_text("premise,hypothesis,label\nx,y,yes\nz,y,yes\n")
    (tmp_path / "odd.csv").write_text("premise,hypothesis,label\nx,y,perhaps\nz,y,yes\n")
    (tmp_path / "half.csv").write_text("premise,hypothesis,label\nx,y,1.5\nz,y,2\n")
    model, config = ["--model_name_or_path", out], (tmp_path / "out" / "config.json").read_text()
    results = ["--output_dir", str(tmp_path / "r")]
    for argv, message in (
        (["fit"], "command: 'fit' is unknown; choose one of train, fit-cascade, eval"),
        ([], "command: is missing; choose one of train, fit-cascade, eval"),
        (["fit-cascade", *model, "--fit_file", str(tmp_path / "one.csv")], "all 2 rows are of class 1"),
        (["fit-cascade", *model, "--fit_file", str(tmp_path / "odd.csv")], "fit_file: the model has no class perhaps"),
        (["fit-cascade", *model, "--fit_file", str(tmp_path / "half.csv")], "fit_file: the label in row 1 is 1.5"),
        (
            ["eval", "--model_name_or_path", backbone_path("bert"), "--eval_file", "x", *results],
            "has no classify.json",
        ),
        (["eval", *model, "--eval_file", "x.csv", "--timing_runs", "1", *results], "timing_runs: there is no cascade"),
        (["fit-cascade", *model, "--fit_file", "x.csv", "--batch_size", "0"], "batch_size: 0 is not allowed"),
        (["eval", *model, "--eval_file", "x.csv", "--timing_runs", "-1", *results], "timing_runs: -1 is not allowed"),
        (["train", *[w for n, v in files.items() for w in (n, *v)]], "is not empty; choose another folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            classify.main(argv)
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "out" / "config.json").read_text() == config
    classify.main(["--help"])
    assert "fit-cascade" in capsys.readouterr().out
