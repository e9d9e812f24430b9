"""pretrain.py as a user runs it: end to end and on to fine-tuning, and every wrong input ends in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import LADDER, SENTENCES
from datasets import Dataset

from modeling_2dmse import StarbucksForMaskedAutoencoding, TwoDMSEModel
from run_scripts import finetune, pretrain
from run_scripts.shared import cli
from trainer.smae.arguments import SmaeTrainingArguments

RECIPES = Path(pretrain.__file__).parent / "recipes"


@pytest.fixture
def settings(tmp_path, backbone_path):
    """The flags of a run that works."""
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    return {
        "--model_name_or_path": [backbone_path("bert")],
        "--train_file": [str(tmp_path / "texts.txt")],
        "--sizes": LADDER,
        "--per_device_train_batch_size": ["4"],
        "--max_steps": ["4"],
        "--max_length": ["16"],
        "--save_steps": ["2"],
        "--output_dir": [str(tmp_path / "out")],
        "--bf16": ["false"],
        "--use_cpu": ["true"],
        "--disable_tqdm": ["true"],
    }


def run(settings: dict) -> None:
    pretrain.main([word for name, values in settings.items() for word in (name, *values)])


def test_end_to_end_and_on_to_fine_tuning(settings, tmp_path, capsys):
    run(settings | {"--eval_file": settings["--train_file"], "--logging_steps": ["1"], "--packing": ["true"]})
    printed, out = capsys.readouterr().out, tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["eval_loss"] != results["after"]["eval_loss"]
    for name in ("eval_accuracy_mae_2x16", "eval_unigram_mlm"):
        assert f"{results['after'][name]:.4f}" in printed
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss_mae/2x16" in entry] == [1, 2, 3, 4]
    whole = StarbucksForMaskedAutoencoding.from_pretrained(out)
    encoder = TwoDMSEModel.from_pretrained(out / "encoder")
    assert encoder.config.sizes == LADDER
    start = TwoDMSEModel.from_backbone(settings["--model_name_or_path"][0])
    pairs = zip(whole.encoder.parameters(), encoder.parameters(), start.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(b, c) for a, b, c in pairs)
    rows = {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}
    Dataset.from_dict(rows).to_csv(tmp_path / "pairs.csv", index=False)
    kept = ("--max_steps", "--bf16", "--use_cpu", "--disable_tqdm", "--per_device_train_batch_size")
    flags = [word for name in kept for word in (name, *settings[name])]
    flags += ["--train_file", str(tmp_path / "pairs.csv"), "--output_dir", str(tmp_path / "tuned")]
    finetune.main(["--model_name_or_path", str(out / "encoder"), *flags])
    assert TwoDMSEModel.from_pretrained(tmp_path / "tuned").config.sizes == LADDER
    with pytest.raises(SystemExit):
        finetune.main(["--model_name_or_path", str(out), *flags, "--overwrite", "true"])
    assert f"is a pre-training model; use {out}/encoder" in capsys.readouterr().err


def test_resumes_from_a_checkpoint_and_starts_from_a_finished_run(settings, tmp_path):
    run(settings)
    first = StarbucksForMaskedAutoencoding.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    run(settings | {"--resume_from_checkpoint": [str(tmp_path / "out" / "checkpoint-2")]})
    again = StarbucksForMaskedAutoencoding.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    run(settings | {"--model_name_or_path": [str(tmp_path / "out")], "--output_dir": [str(tmp_path / "more")]})
    more = StarbucksForMaskedAutoencoding.from_pretrained(tmp_path / "more")
    assert not torch.equal(more.head.bias, first.head.bias)


def test_streams(settings, tmp_path):
    run(settings | {"--streaming": ["true"]})
    assert TwoDMSEModel.from_pretrained(tmp_path / "out" / "encoder").config.sizes == LADDER


def _file(folder, name, content) -> list[str]:
    (folder / name).write_text(content)
    return [str(folder / name)]


WRONG = {
    "empty file": (lambda f: {"--train_file": _file(f, "e.txt", "")}, "e.txt is empty"),
    "no such column": (
        lambda f: {"--train_file": _file(f, "c.csv", "body\nsome words here\n")},
        "train_file: there is no column text (--text_column) among body",
    ),
    "short lines": (
        lambda f: {"--train_file": _file(f, "s.txt", "one two\nthree\n")},
        "train_file: no text has 3 words or more",
    ),
    "no texts": (lambda f: {"--train_file": []}, "expected one argument"),
    "a stream without steps": (
        lambda f: {"--streaming": ["true"], "--max_steps": ["-1"]},
        "max_steps: a stream has no length; name the optimizer steps with --max_steps",
    ),
    "a size too many": (lambda f: {"--sizes": ["9x8"]}, "9x8 asks for 9 layers, but the backbone has 1 to 4"),
    "no model": (lambda f: {"--model_name_or_path": ["./absent"]}, "model_name_or_path: ./absent does not exist"),
    "rates": (lambda f: {"--mlm_probability": ["0.6"]}, "mlm_probability: 0.6 is above decoder_mlm_probability (0.4)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_in_one_line(name, settings, tmp_path, capsys):
    change, message = WRONG[name]
    with pytest.raises(SystemExit) as stopped:
        run(settings | change(tmp_path))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in lines) == 1
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_cannot_mask_is_refused(settings, backbone_path, tokenizer, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(settings | {"--model_name_or_path": [backbone_path("llama")]})
    assert "backbone: LlamaModel reads from left to right; SMAE needs an encoder" in capsys.readouterr().err
    TwoDMSEModel.from_backbone(backbone_path("bert")).backbone.save_pretrained(tmp_path / "silent")
    silent = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", cls_token="[CLS]")
    silent.save_pretrained(tmp_path / "silent")
    with pytest.raises(SystemExit, match="2"):
        run(settings | {"--model_name_or_path": [str(tmp_path / "silent")]})
    assert "has no mask token" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES.glob("smae-*.yaml")), ids=lambda p: p.name)
def test_recipes_are_understood(path, tmp_path):
    parser = cli.Parser((pretrain.ModelArguments, pretrain.DataArguments, SmaeTrainingArguments))
    _, _, args = parser.parse([str(path), "--output_dir", str(tmp_path), "--bf16", "false"])
    recipe = yaml.safe_load(path.read_text())
    assert args.sizes == recipe["sizes"]
    assert args.learning_rate == recipe["learning_rate"]
