"""No secret of a command line or the environment reaches a file, the screen or an error."""

import copy
import pickle

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from run_scripts import finetune
from run_scripts.shared import secrets
from trainer import TwoDMSETrainingArguments

TOKEN, OWN_TOKEN = "hf_QmVyeVNlY3JldFRva2Vu", "an-own-hub-token"
IN_URL, IN_ENVIRONMENT = "user:swordfish", "wandb-c0ffee"


@pytest.fixture
def words(backbone_path, tmp_path):
    Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}).to_csv(tmp_path / "pairs.csv")
    return [
        *("--model_name_or_path", backbone_path("bert"), "--train_file", str(tmp_path / "pairs.csv")),
        *("--sizes", *LADDER, "--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "4"),
        *("--output_dir", str(tmp_path / "out"), "--bf16", "false", "--use_cpu", "true", "--report_to", "tensorboard"),
    ]


@pytest.mark.parametrize("given", ["word", "equals", "recipe"])
def test_no_file_of_a_run_has_a_secret(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", IN_ENVIRONMENT)
    token = OWN_TOKEN if given == "word" else TOKEN
    words += ["--license", f"https://{IN_URL}@example.com/license", "--run_name", "named", "--logging_steps", "1"]
    if given == "recipe":
        (tmp_path / "recipe.yaml").write_text(f"hub_token: {token}\n")
        words = [str(tmp_path / "recipe.yaml"), *words]
    else:
        words += ["--hub_token", token] if given == "word" else [f"--hub_token={token}"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *words])
    finetune.main(words)
    printed = "".join(capsys.readouterr())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"README.md", "training_args.bin", "trainer_state.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    for secret in (token, IN_URL, IN_ENVIRONMENT):
        assert secret not in printed
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "https://***@example.com/license" in card
    assert given == "recipe" or "--hub_token" in card, "the rest of the command is there"
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (saved.hub_token, saved.run_name) == (None, "named"), "without the token, the rest is there"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--hub_tokn", TOKEN],
        ["--hub_token", OWN_TOKEN, OWN_TOKEN],
        ["--train_file", f"https://{IN_URL}@example.com/pairs.csv"],
        ["--hub_token", OWN_TOKEN, "--license", OWN_TOKEN, "--lora_r", OWN_TOKEN],
    ],
)
def test_no_error_has_a_secret(wrong, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        finetune.main([*words, *wrong])
    error = capsys.readouterr().err
    assert "***" in error or "--hub_tokn is unknown" in error, "a flag that is unknown is named without its value"
    assert not [secret for secret in (TOKEN, OWN_TOKEN, IN_URL) if secret in error]


def test_the_token_works_and_is_not_written(tmp_path):
    args = TwoDMSETrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True, bf16=False)
    assert f"Bearer {args.hub_token}" == f"Bearer {TOKEN}"
    assert copy.deepcopy(args).hub_token == copy.copy(args).hub_token == TOKEN
    assert TOKEN not in repr(args) + str(args) + args.to_json_string()
    assert TOKEN.encode() not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).hub_token is None


def test_what_is_hidden(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("MY_SECRET", "in-the-environment")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    secrets.remember(
        [
            "--token",
            "given-here",
            "--visual_token_sizes",
            "1024000",
            "--pooling",
            "lasttoken",
            "--dataset_name",
            "https://me:word@host/x",
            "--eval_file",
            "ssh://git@host/git",
        ]
    )
    for text, hidden in (
        ("a given-here b", "a *** b"),
        ("in-the-environment", "***"),
        ("https://me:pass@host/x and git://tok@host", "https://***@host/x and git://***@host"),
        ("hf_abcdefgh1234", "***"),
        ("no file /here/https:/me:word@host/x or git", "no file /here/https:/***@host/x or git"),
        ("/home/me/token disabled 1024000 lasttoken me@host https://host/@x", None),
    ):
        assert secrets.hide(text) == (text if hidden is None else hidden)
