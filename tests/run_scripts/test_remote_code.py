"""Scripts run no code of a model's folder, and do not ask on standard input whether to run it."""

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LADDER, SENTENCES
from datasets import Dataset
from tiny_vision import tiny_model as tiny_franca
from tiny_vision import write_pictures
from transformers import AutoTokenizer, dynamic_module_utils

from modeling_mrl import MatryoshkaForSequenceClassification
from retrieval import FunnelIndex
from run_scripts import (
    benchmark,
    classify,
    elasticize,
    encode,
    evaluate,
    evaluate_franca,
    evaluate_m3,
    export,
    finetune,
    mine_negatives,
    plan,
    pretrain,
    pretrain_franca,
    search,
    train_m3,
)
from run_scripts.benchmarks import host, step
from run_scripts.shared import models  # noqa: F401, it must be imported before a test changes the time limit

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ["--max_steps", "1", "--bf16", "false", "--use_cpu", "true", "--report_to", "none"]
ANSWERS = "y\n" * 3000
# What the code of the folder would do.
CODE = """
from pathlib import Path
Path({marker!r}).write_text("this code was run")
from transformers import BertConfig, BertModel, BitImageProcessor, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast): pass
class OwnImages(BitImageProcessor): pass
class OwnConfig(BertConfig): model_type = "brand-new"
class OwnModel(BertModel): config_class = OwnConfig
"""


def add_code(folder: Path, kind: str) -> Path:
    """Let the model of a folder need code: for its tokenizer, its image processor or its configuration."""
    marker = folder.parent / "marker"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    if kind == "config":
        names = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
        (folder / "config.json").write_text(json.dumps({"model_type": "brand-new", "auto_map": names}))
    elif kind == "tokenizer":
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        path.write_text(json.dumps(settings))
    else:
        own = {"image_processor_type": "OwnImages", "auto_map": {"AutoImageProcessor": "own.OwnImages"}}
        path, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
        settings = json.loads((path if path.is_file() else alone).read_text())
        settings = (
            settings | {"image_processor": settings["image_processor"] | own} if path.is_file() else settings | own
        )
        (path if path.is_file() else alone).write_text(json.dumps(settings))
    return marker


@pytest.fixture
def elastic(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def classifier(backbone_path, tokenizer, tmp_path):
    folder = tmp_path / "model"
    MatryoshkaForSequenceClassification.from_backbone(backbone_path("bert"), sizes=[4, 32]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"text_columns": ["text"], "label_column": "label", "max_length": 16}
    (folder / "classify.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def llava(llava_path, tmp_path):
    return Path(shutil.copytree(llava_path, tmp_path / "model"))


@pytest.fixture
def franca(tmp_path):
    tiny_franca().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def texts(folder: Path) -> str:
    (folder / "texts.txt").write_text("\n".join(SENTENCES))
    return str(folder / "texts.txt")


def table(folder: Path, *columns: str) -> str:
    # Each column has texts of its own: pairs of equal texts are refused.
    values = {name: SENTENCES[place:] + SENTENCES[:place] for place, name in enumerate(columns)}
    values |= {"score": [0.0, 1.0] * 10} if "score" in columns else {}
    values |= {"label": ["a", "b"] * 10} if "label" in columns else {}
    Dataset.from_dict(values).to_csv(folder / "table.csv", index=False)
    return str(folder / "table.csv")


def index(folder: Path) -> str:
    made = {"name": str(folder / "model"), "weights": 1, "num_layers": 4, "max_length": 8}
    FunnelIndex.build(np.eye(4, dtype=np.float32), folder / "index", model=made)
    return str(folder / "index")


def conversations(folder: Path) -> str:
    picture = str(next(write_pictures(folder / "pictures", 1).rglob("*.png")))
    messages = [{"role": "user", "content": "which digit ?"}, {"role": "assistant", "content": "1"}]
    (folder / "rows.jsonl").write_text(json.dumps({"image": picture, "messages": messages}) + "\n")
    return str(folder / "rows.jsonl")


def pictures(folder: Path) -> str:
    return str(write_pictures(folder / "pictures", 6))


MODEL, OUT = "--model_name_or_path", "--output_dir"
# The fixture of the model, the script, and its flags besides the model and the output folder.
CASES = {
    "benchmark encode": ("elastic", benchmark.main, lambda f: ["encode", "--texts", texts(f)]),
    "benchmark host": (
        "elastic",
        benchmark.main,
        lambda f: ["host", "--texts", texts(f), "--train_file", table(f, "anchor", "positive")],
    ),
    "benchmark memory": ("elastic", benchmark.main, lambda f: ["memory", "--sizes", *LADDER]),
    "benchmark startup": ("elastic", benchmark.main, lambda f: ["startup"]),
    "encode": ("elastic", encode.main, lambda f: ["--input", texts(f)]),
    "evaluate": ("elastic", evaluate.main, lambda f: ["--sts_files", table(f, "sentence1", "sentence2", "score")]),
    "export": ("elastic", export.main, lambda f: []),
    "finetune": (
        "elastic",
        finetune.main,
        lambda f: ["--train_file", table(f, "anchor", "positive"), "--per_device_train_batch_size", "4", *TRAINING],
    ),
    "elasticize": ("elastic", elasticize.main, lambda f: ["--corpus_file", texts(f), "--effort", "fit", *TRAINING]),
    "pretrain": ("elastic", pretrain.main, lambda f: ["--train_file", texts(f), "--sizes", *LADDER, *TRAINING]),
    "plan": ("elastic", plan.main, lambda f: ["--texts", texts(f)]),
    "mine_negatives": (
        "elastic",
        mine_negatives.main,
        lambda f: ["--train_file", table(f, "anchor", "positive"), "--output_file", str(f / "out.csv")],
    ),
    "search": ("elastic", search.main, lambda f: [index(f), "a query"]),
    "classify train": (
        "elastic",
        classify.main,
        lambda f: ["train", "--train_file", table(f, "text", "label"), "--sizes", "1x8", *TRAINING],
    ),
    "classify fit-cascade": (
        "classifier",
        classify.main,
        lambda f: ["fit-cascade", "--fit_file", table(f, "text", "label")],
    ),
    "classify eval": ("classifier", classify.main, lambda f: ["eval", "--eval_file", table(f, "text", "label")]),
    "train_m3": ("llava", train_m3.main, lambda f: ["--train_file", conversations(f), *TRAINING]),
    "evaluate_m3": ("llava", evaluate_m3.main, lambda f: ["--data_file", conversations(f)]),
    "pretrain_franca": ("franca", pretrain_franca.main, lambda f: ["--train_dir", pictures(f), *TRAINING]),
    "evaluate_franca": (
        "franca",
        evaluate_franca.main,
        lambda f: ["--train_dir", pictures(f), "--test_dir", str(f / "pictures")],
    ),
}
# These read the type of the model themselves, and refuse it before any code could be run, or load only the tokenizer.
ONLY_TOKENIZER = ("benchmark host", "classify fit-cascade", "classify eval")
PARAMETERS = [
    (name, kind)
    for name, (fixture, *_) in CASES.items()
    for kind in ("processor" if fixture in ("franca", "llava") else "tokenizer", "config")
    if kind != "config" or name not in ONLY_TOKENIZER
]


def command(name: str, folder: Path) -> list[str]:
    words = CASES[name][2](folder)
    words += [] if name == "search" else [MODEL, str(folder / "model")]
    has_output = name not in ("search", "mine_negatives", "classify fit-cascade")
    return words + ([OUT, str(folder / "out")] if has_output else [])


@pytest.mark.parametrize(("name", "kind"), PARAMETERS)
def test_code_of_the_folder_is_refused_in_one_line(name, kind, request, tmp_path, monkeypatch, capsys):
    marker = add_code(request.getfixturevalue(CASES[name][0]), kind)
    words, answers = command(name, tmp_path), io.StringIO(ANSWERS)
    monkeypatch.setattr(sys, "stdin", answers)
    # Without the second line of defence: each load says itself that no code may be run.
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        CASES[name][1](words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert "--trust_remote_code true" in lines[0]
    assert str(tmp_path / "model") in lines[0]
    assert not marker.exists()
    assert answers.tell() == 0, "a load has read standard input"
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_benchmark_runs_the_code_with_the_flag(elastic, tmp_path, monkeypatch):
    marker = add_code(elastic, "tokenizer")
    monkeypatch.setattr(host, "TRIPLETS", 4)
    monkeypatch.setattr(step, "TRIPLETS", 4)
    words = ["host", "--texts", texts(tmp_path), "--train_file", table(tmp_path, "anchor", "positive"), "--runs", "1"]
    benchmark.main(
        [*words, "--sizes", *LADDER, MODEL, str(elastic), OUT, str(tmp_path / "out"), "--trust_remote_code", "true"]
    )
    assert marker.exists()
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [line["id"] for line in rows] == [
        "host.encode",
        "host.train",
        "host.train.again",
        "step.launches",
        "step.syncs",
    ]


def test_such_a_folder_is_asked_about_without_the_word(elastic, monkeypatch):
    """What the tests above rest on: transformers asks about this folder, and an answer of yes runs its code."""
    add_code(elastic, "tokenizer")
    questions = []
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)
    monkeypatch.setattr(builtins, "input", lambda text: questions.append(text) or "n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(elastic)
    assert len(questions) == 1
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)  # as run_scripts.shared.models sets it
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(elastic)
    assert len(questions) == 1


def start_encode(folder: Path, lines: Path, *more: str):
    script = [sys.executable, str(ROOT / "run_scripts" / "encode.py"), MODEL, str(folder / "model"), "--input", "-"]
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    with open(lines, "rb", buffering=0) as stdin:
        done = subprocess.run(
            [*script, OUT, str(folder / "out"), *more],
            stdin=stdin,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, os.lseek(stdin.fileno(), 0, os.SEEK_CUR)


def test_piped_texts_answer_no_question(elastic, tmp_path):
    marker = add_code(elastic, "tokenizer")
    (tmp_path / "lines.txt").write_text(ANSWERS)
    done, position = start_encode(tmp_path, tmp_path / "lines.txt")
    assert (done.returncode, position) == (2, 0)
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # after the bar of the weights
    assert line.startswith("encode.py: error: model_name_or_path: ")
    assert "--trust_remote_code true" in line
    assert not marker.exists()
    done, _ = start_encode(tmp_path, tmp_path / "lines.txt", "--trust_remote_code", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert marker.exists(), "with the flag, the code is run"
    assert done.stdout.startswith("3000 texts in 1 shard,")
