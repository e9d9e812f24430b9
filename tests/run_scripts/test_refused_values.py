"""Values that no flag can mean, files that outputs must not replace, and disks that are full at the end of a run."""

import errno
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SENTENCES, cpu_environment

from modeling_2dmse import Size
from modeling_2dmse.loading import check_weights
from retrieval.reading import Text
from retrieval.shards import encode_shards, finish
from run_scripts import (
    build_index,
    compare,
    digits_franca,
    digits_m3,
    elasticize,
    encode,
    evaluate,
    evaluate_franca,
    evaluate_m3,
    finetune,
    mine_negatives,
    plan,
)
from run_scripts.benchmarks import digits
from run_scripts.comparing.store import Store
from run_scripts.shared import cli, output, plots
from run_scripts.training import finetuning, franca
from trainer.mrl.trainer import evaluate_classifier


@pytest.fixture
def start(tiny_model, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    pairs = [f"{a},{b}" for a, b in zip(SENTENCES[::2], SENTENCES[1::2], strict=True)]
    (tmp_path / "pairs.csv").write_text("\n".join(["anchor,positive", *pairs]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(run, words, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(words)
    (line,) = capsys.readouterr().err.splitlines()
    return line.partition("error: ")[2]


def test_a_prompt_may_be_empty(tmp_path):
    flags = ["--document_prompt", "", "--query_prompt", "query: ", "--output_dir", str(tmp_path)]
    *_, args = cli.Parser(finetune.ARGUMENTS).parse([str(cli.RECIPES / "minilm-best.yaml"), *flags])
    assert (args.query_prompt, args.document_prompt) == ("query: ", "")


@pytest.mark.parametrize(
    ("run", "flag", "value", "message"),
    [
        (encode, "output_dir", "", "output_dir: its value is empty"),
        (encode, "model_name_or_path", "", "model_name_or_path: its value is empty"),
        (elasticize, "teacher_model_name_or_path", "", "teacher_model_name_or_path: its value is empty"),
        (evaluate, "sts_files", "", "sts_files: its value is empty"),
        (build_index, "collection", "", "collection: its value is empty"),
        (encode, "output_dir", "a\0b", r"output_dir: 'a\x00b' has a NUL character"),
        (encode, "shard_size", "9" * 30, f"shard_size: {'9' * 30} is not allowed; use a number below"),
        (plan, "corpus_size", "9" * 400, "corpus_size: 999"),
    ],
)
def test_values_that_mean_nothing(run, flag, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    required = {"encode": ("input", "output_dir"), "evaluate": ("output_dir",), "elasticize": ("output_dir",)}
    names = [*required.get(run.__name__.rpartition(".")[2], ()), "model_name_or_path"]
    names = ["embeddings"] if run is build_index else names
    words = [word for name in names if name != flag for word in (f"--{name}", "x")]
    assert refused(run.main, [*words, f"--{flag}", value], capsys).startswith(message)
    assert list(tmp_path.iterdir()) == []


MODEL = ("--model_name_or_path", "m")
SAME = ("--eval_file", "x", "--sts_files", "x", "--methods", "2dmse", "--train_file", "x", "--recipe", "x")


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        (compare, [*SAME, "--learning_rates", "nan", "1e-3"], "learning_rates: [nan, 0.001] is not allowed"),
        (compare, [*SAME, "--learning_rates", "1e-3", "inf"], "learning_rates: [0.001, inf] is not allowed"),
        (compare, [*SAME, "--seeds", "0", "-1"], "seeds: -1 is not allowed; use whole numbers from 0 to 4294967295"),
        (compare, [*SAME, "--train", "../x"], "train: '../x' is not allowed; use the name of a file"),
        (digits_franca, ["--seeds", "-1", "--output_dir", "x"], "seeds: -1 is not allowed"),
        (digits_m3, ["--seed", str(2**32), "--output_dir", "x"], "seed: 4294967296 is not allowed"),
        (
            evaluate_franca,
            ["--seed", "-1", "--model_name_or_path", "m", "--output_dir", "x"],
            "seed: -1 is not allowed",
        ),
    ],
)
def test_rates_seeds_and_names(run, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refused(run.main, words, capsys).startswith(message)


def test_any_path_can_be_printed():
    """In a process whose standard output takes UTF-8 only."""
    code = "from run_scripts.shared import cli; cli.Parser(()).parse([]); print('caf\\udcff')"
    strict = cpu_environment(PYTHONIOENCODING="utf-8:strict")
    done = subprocess.run([sys.executable, "-c", code], env=strict, capture_output=True, check=True)
    assert done.stdout == b"caf\\udcff\n"


def test_plan_reads_its_texts_and_scores_strictly(start, capsys):
    words = ["--model_name_or_path", "model", "--sizes", "1x8"]
    (start / "bad.txt").write_bytes(b"good\nb\xffd\n")
    line = refused(plan.main, [*words, "--texts", "bad.txt"], capsys)
    assert line == "texts: line 2 of bad.txt is malformed: byte 2 is not UTF-8"
    for scores, message in (({"1x8": float("nan")}, "has a score that is not finite"),
                            ({"9x9": 0.5}, "has scores of 9x9, and of none of the sizes")):  # fmt: skip
        (start / "r.json").write_text(json.dumps({"sts": {"a": {"spearman": scores}}}))
        assert message in refused(plan.main, [*words, "--texts", "texts.txt", "--results", "r.json"], capsys)


def test_negatives_do_not_replace_the_corpus(start, capsys):
    (start / "qrels").mkdir()
    (start / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td1\t1\n")
    for name in ("corpus", "queries"):
        rows = [json.dumps({"_id": f"d{i}", "text": text}) for i, text in enumerate(SENTENCES)]
        (start / f"{name}.jsonl").write_text("\n".join(rows))
    words = ["--model_name_or_path", "model", "--beir_dir", ".", "--beir_split", "test", "--overwrite"]
    for name in ("corpus.jsonl", "queries.jsonl"):
        line = refused(mine_negatives.main, [*words, "--output_file", name], capsys)
        assert line == f"output_file: {name} is read as beir_dir and not replaced; choose another"


def test_encode_deletes_its_own_files_only(tmp_path):
    foreign = [tmp_path / "photos" / name for name in ("20240101.npy", ".1.json", "²²²²².npy", "7.txt")]
    stale = [tmp_path / "1x8" / "00003.npy", tmp_path / "ids" / ".00000.json", tmp_path / "done" / "00001.json"]
    for path in (*foreign, *stale):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    texts = [Text("a", "a text")]
    summary = encode_shards(texts, lambda batch: {"1x8": np.ones((1, 8), np.float32)}, tmp_path, ["1x8"], 4, "npy")
    finish(tmp_path, {"sizes": ["1x8"]}, summary)
    assert [path.exists() for path in (*foreign, *stale)] == [True] * 4 + [False] * 3
    assert (tmp_path / "1x8" / "00000.npy").is_file()


def test_encode_resumes_after_a_kill_at_its_first_file(start):
    (start / "out").mkdir()
    (start / "out" / ".settings.json.1f").write_text('{"mod')
    encode.main(["--model_name_or_path", "model", "--input", "texts.txt", "--output_dir", "out"])
    assert not (start / "out" / ".settings.json.1f").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": [], "search": [], "rows": []}',
                                     '{"settings": {}, "search": [3], "rows": []}', "[" * 100_000])  # fmt: skip
def test_results_of_another_kind(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"results_file: {tmp_path}/r.json is not a file of this script: ")):
        Store(str(tmp_path / "r.json"), tmp_path / "lock", "nli", {})


def test_pictures_are_written_at_once(tmp_path, monkeypatch):
    """A kill or a full disk in between leaves the earlier picture."""
    from matplotlib.figure import Figure

    path, sizes = tmp_path / "heatmap.png", [Size(1, 8), Size(4, 32)]
    results = {"model": "m", "sts": {"a": {"spearman": {str(size): 0.5 for size in sizes}}}}
    plots.save_heatmap(results, sizes, sizes, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def half(self, place, **options):
        with open(place, "wb") as file:
            file.write(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        plots.save_heatmap(results, sizes, sizes, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_at_the_end_of_other_scripts(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.json, "dump", full)
    monkeypatch.setattr(digits, "load_parts", lambda validation: None)
    monkeypatch.setattr(digits, "train_digits", lambda *args: None)
    monkeypatch.setattr(digits, "score_digits", lambda *args: {"4": 0.5, "8": 0.5})
    words = ["--steps", "1", "--seeds", "0", "--output_dir", str(tmp_path)]
    assert refused(digits_franca.main, words, capsys).startswith(f"output_dir: {tmp_path} could not be written: ")
    scores = {"sts": {"a": {"spearman": {"1x8": 0.5}}}}
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), ladder=[Size(1, 8)])
    trainer.results, trainer.is_world_process_zero = lambda tasks, sizes: scores, lambda: True
    evaluated = lambda _: finetuning.evaluate(trainer, SimpleNamespace(num_layers=1), ["a"], scores)
    assert refused(evaluated, [], capsys).startswith(f"output_dir: {tmp_path} could not be written: ")


def test_saved_buffers_must_be_finite():
    """The statistics of a norm, for example."""
    norm = torch.nn.BatchNorm1d(2)
    norm.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
    check_weights(norm, "m")
    norm.running_var.fill_(torch.nan)
    with pytest.raises(ValueError, match="m: the values of running_var are not finite"):
        check_weights(norm, "m")


def test_scores_that_are_not_finite():
    logits = torch.tensor([[[0.5, torch.nan]]])
    model = SimpleNamespace(config=SimpleNamespace(ladder=[Size(1, 8)]), collect_logits=lambda *_: (logits, None))
    with pytest.raises(ValueError, match="the model's scores are not finite"):
        evaluate_classifier(model, None, None)
    evaluate_m3.check_losses({4: 0.5})
    with pytest.raises(ValueError, match="the loss at 36 visual tokens is nan"):
        evaluate_m3.check_losses({4: 0.5, 36: float("nan")})
    with pytest.raises(ValueError, match="is not JSON: maximum recursion depth"):
        franca._read_backbone_config("[" * 100_000)


def test_weights_that_are_a_pickle(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    (tmp_path / "texts.txt").write_text("a\n")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--input", str(tmp_path / "texts.txt")]
    reason = "its weights are a pickle that torch does not read, because it could run code; use safetensors"
    found = refused(encode.main, [*words, "--output_dir", str(tmp_path / "out")], capsys)
    assert found == f"model_name_or_path: {tmp_path}/model does not load: {reason}"
