"""No wrong result with exit code 0: exports, resumed encodings and trainings, evaluations, replaced indexes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LADDER, SENTENCES, cpu_environment
from datasets import Dataset
from safetensors.torch import load_file

from modeling_2dmse import TwoDMSEModel
from retrieval import FunnelIndex, replacing
from run_scripts import encode, evaluate, export, finetune
from run_scripts.shared import output
from trainer.evaluation import RetrievalData, StsData, evaluate_tasks

ROOT = Path(__file__).resolve().parents[2]
SCORED = {"sentence1": SENTENCES[::2], "sentence2": SENTENCES[1::2], "score": [0.5 * i for i in range(10)]}


@pytest.fixture
def start(tiny_model, tmp_path):
    tiny_model(projected=True).save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    Dataset.from_dict(SCORED).to_csv(tmp_path / "scored.csv")
    Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}).to_csv(tmp_path / "pairs.csv")
    return tmp_path


def refused(run, flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_export_measures_what_a_client_gets(start, capsys):
    flags = ["--model_name_or_path", str(start / "model"), "--num_layers", "2", "--dim", "8", "--sts_files"]
    export.main([*flags, str(start / "scored.csv"), "--output_dir", str(start / "small")])
    after, before = map(float, re.search(r"Spearman (\S+), in the model (\S+) ", capsys.readouterr().out).groups())
    texts = list(dict.fromkeys(SENTENCES))
    client = pytest.importorskip("sentence_transformers").SentenceTransformer(str(start / "small"), device="cpu")
    assert np.allclose(export.plain_encoder(str(start / "small"))(texts), client.encode(texts), atol=1e-5)
    task = StsData("scored", *SCORED.values())
    assert after == pytest.approx(export.spearman(task, client.encode), abs=1e-4)
    assert after == pytest.approx(before, abs=1e-3), "the cut to 8 dimensions is part of what was written"


def encode_flags(folder, *more):
    model = ["--model_name_or_path", str(folder / "model"), "--input", str(folder / "texts.txt"), "--shard_size", "5"]
    return [*model, "--output_dir", str(folder / "out"), "--sizes", "1x8", "4x32", *more]


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_encode_makes_damaged_shards_again(start, format, monkeypatch):
    flags, out, calls = encode_flags(start, "--format", format), start / "out", []
    encode.main(flags)
    whole = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    embed = encode.embed
    monkeypatch.setattr(encode, "embed", lambda model, texts, *rest: calls.append(texts) or embed(model, texts, *rest))
    shard, marker = out / "1x8" / f"00001.{format}", out / "done" / "00002.json"
    flipped = bytearray(whole[shard])
    flipped[-3] ^= 1
    done = json.loads(marker.read_text())
    for path, content in (
        (shard, None), (shard, whole[shard][:-9]), (shard, bytes(flipped)), (shard, b""), (marker, None),
        (marker, b"[]"), (marker, b"{"), (marker, b"\xff"), (marker, b"{}"), (marker, b'{"crc32": "1"}'),
        (marker, json.dumps({"rows": 5, "crc32": done["crc32"]}).encode()),
        (marker, json.dumps({**done, "files": {}}).encode()), (marker, json.dumps({**done, "files": 3}).encode()),
    ):  # fmt: skip
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        (out / "1x8" / ".00009.npy").write_bytes(b"left by a killed run")
        calls.clear()
        encode.main(flags)
        assert calls == [SENTENCES[5:10] if path == shard else SENTENCES[10:15]]
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole


def test_encode_refuses_what_another_model_has_made(start, capsys, monkeypatch):
    encode.main(encode_flags(start))
    config, tokens = start / "model" / "config.json", start / "model" / "tokenizer.json"
    good = json.loads(config.read_text()), tokens.read_text()
    for change, message in (
        ({"pooling": "cls"}, "made with pooling 'mean', not 'cls'"),
        ({"backbone_config": good[0]["backbone_config"] | {"hidden_act": "relu"}}, "made with config "),
        ({"prompts": {"q": "ask "}, "default_prompt_name": "q"}, "made with prompt '', not 'ask '"),
    ):
        config.write_text(json.dumps(good[0] | change))
        refused(encode.main, encode_flags(start), message, capsys)
    config.write_text(json.dumps(good[0]))
    tokens.write_text(good[1].replace('"guitar"', '"guitars"'))
    refused(encode.main, encode_flags(start), "made with tokenizer ", capsys)
    tokens.write_text(good[1])
    refused(encode.main, encode_flags(start, "--max_length", "9"), "made with max_length 48, not 9", capsys)
    monkeypatch.setattr(encode, "__version__", "9.9")
    refused(encode.main, encode_flags(start), "made with version ", capsys)


def test_files_of_one_name_are_told_apart(start, tiny_model, capsys):
    for place in ("a", "b"):
        (start / place).mkdir()
        shutil.copy(start / "scored.csv", start / place / "sts.csv")
    model = ["--model_name_or_path", str(start / "model"), "--output_dir", str(start / "out"), "--sts_files"]
    evaluate.main([*model, str(start / "a" / "sts.csv"), str(start / "b" / "sts.csv"), str(start / "scored.csv")])
    results = json.loads((start / "out" / "results.json").read_text())
    assert list(results["sts"]) == ["a/sts.csv", "b/sts.csv", "scored"]
    twice = [*model, str(start / "a" / "sts.csv"), str(start / "a" / ".." / "a" / "sts.csv"), "--overwrite"]
    refused(evaluate.main, twice, "sts.csv is named twice", capsys)
    tasks = [StsData("x", *SCORED.values()), RetrievalData("x", {"q": "a"}, {"d": "a"}, {"q": {"d": 1}})]
    with pytest.raises(ValueError, match="have the same name"):
        evaluate_tasks(tiny_model(), tasks, tiny_model().config.ladder)


def test_no_task_takes_the_place_of_the_mean(start, capsys):
    shutil.copy(start / "scored.csv", start / "mean.csv")
    flags = ["--model_name_or_path", str(start / "model"), "--output_dir", str(start / "out"), "--sts_files"]
    evaluate.main([*flags, str(start / "scored.csv"), str(start / "mean.csv")])
    assert list(json.loads((start / "out" / "results.json").read_text())["sts"]) == ["scored", "mean.csv"]
    assert capsys.readouterr().out.splitlines()[0].split() == ["size", "scored", "mean.csv", "mean"]


def test_a_full_disk_at_the_end_of_an_evaluation(start, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.json, "dump", full)
    flags = ["--model_name_or_path", str(start / "model"), "--output_dir", str(start / "out"), "--sts_files"]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*flags, str(start / "scored.csv")])
    printed = capsys.readouterr()
    assert f"output_dir: {start / 'out'} could not be written: " in printed.err.splitlines()[-1]
    assert "No space left" in printed.err
    assert "1x8" in printed.out, "the scores are not lost"
    assert list((start / "out").iterdir()) == []


def train(folder, name, *more):
    flags = ["--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "pairs.csv")]
    flags += ["--output_dir", str(folder / name), "--per_device_train_batch_size", "4", "--max_eval_samples", "0"]
    flags += ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    finetune.main([*flags, "--sizes", *LADDER, "--learning_rate", "1e-3", "--save_steps", "2", *more])
    return load_file(folder / name / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("length", [("--max_steps", "7"), ("--num_train_epochs", "2")])
def test_a_resumed_run_has_the_weights_of_one_run(start, length, schedule):
    flags = [*length, "--lr_scheduler_type", schedule]
    whole = train(start, "out", *flags)
    last = 7 if "--max_steps" in flags else 6
    # A finished run, resumed, makes no further step.
    assert same(train(start, "out", *flags, "--resume_from_checkpoint", "true"), whole)
    assert (start / "out" / f"checkpoint-{last}").is_dir()
    assert not (start / "out" / f"checkpoint-{last + 1}").exists()
    shutil.rmtree(start / "out" / f"checkpoint-{last}")  # as if it had been stopped in between
    if last == 7:
        shutil.rmtree(start / "out" / "checkpoint-6")
    (start / "out" / "model.safetensors").unlink()
    assert same(train(start, "out", *flags, "--resume_from_checkpoint", "true"), whole)


def test_a_damaged_checkpoint_is_skipped_and_a_later_one_is_no_start(start, capsys, caplog):
    whole = train(start, "out", "--max_steps", "6")
    state = start / "out" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    resume = ("--resume_from_checkpoint", "true")
    assert same(train(start, "out", "--max_steps", "6", *resume), whole)
    assert "checkpoint-6 is incomplete and is skipped: optimizer.pt is damaged" in caplog.text
    refused(lambda more: train(start, "out", *more), ["--max_steps", "3", *resume], "after the last of 3", capsys)


def test_weights_that_the_last_step_breaks_are_not_saved(start, capsys):
    more = ["--max_steps", "1", "--learning_rate", "1e38", "--warmup_steps", "0"]
    refused(lambda words: train(start, "out", *words), more, "are not finite after step 1", capsys)
    assert not list((start / "out").rglob("*.safetensors"))
    assert not (start / "out" / ".checkpoint-partial").exists()


def vectors(seed, count=400):
    return np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_open_index_answers_from_what_it_opened(tmp_path, monkeypatch, can_exchange):
    pytest.importorskip("faiss")
    if not can_exchange:
        monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)
    stages, path = [(8, 60, "approximate"), (16, 5)], tmp_path / "index"
    FunnelIndex.build(vectors(0), path, [8], ids=[f"a{i}" for i in range(400)], approximate=(8, "HNSW8"))
    expected = FunnelIndex.open(path).search(vectors(0)[:9], 5, stages)
    index = FunnelIndex.open(path)
    FunnelIndex.build(
        vectors(1), path, [8], ids=[f"b{i}" for i in range(400)], approximate=(8, "HNSW8"), overwrite=True
    )
    found = index.search(vectors(0)[:9], 5, stages)
    assert np.array_equal(found[0], expected[0])
    assert found[1].tolist() == expected[1].tolist()
    assert FunnelIndex.open(path).search(vectors(1)[:1], 1)[1].tolist() == [["b0"]]
    assert os.listdir(tmp_path) == ["index"]


BUILDS = """
import sys, numpy as np
from retrieval import FunnelIndex
for seed in range(10_000):
    vectors = np.random.default_rng(seed).normal(size=(50, 16))
    FunnelIndex.build(vectors, sys.argv[1], texts=[str(seed)] * 50, overwrite=True)
    print("built", flush=True)
"""


def test_a_reader_finds_one_whole_index_at_every_moment(tmp_path):
    path = tmp_path / "index"
    FunnelIndex.build(vectors(0, 50), path, texts=["first"] * 50)
    environment = cpu_environment(ROOT)
    for pause in (0.02, 0.11, 0.2):
        process = subprocess.Popen([sys.executable, "-c", BUILDS, str(path)], env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()
        end = time.monotonic() + pause
        while time.monotonic() < end:
            assert len({FunnelIndex.open(path).text(0) for _ in range(3)}) >= 1
        process.send_signal(signal.SIGKILL)
        process.communicate()
        index = FunnelIndex.open(path)
        assert len({index.text(row) for row in range(50)}) == 1
    (tmp_path / ".index.partial-99999999").mkdir()  # of a process that is gone
    FunnelIndex.build(vectors(0, 50), path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["index"]


def test_a_kill_between_two_renames_leaves_the_old_index(tmp_path, monkeypatch):
    path, moves = tmp_path / "index", []
    FunnelIndex.build(vectors(0, 50), path, texts=["first"] * 50)
    monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)  # a file system that cannot exchange
    real = os.replace

    def killed(source, target):
        if moves:
            raise KeyboardInterrupt
        moves.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        FunnelIndex.build(vectors(1, 50), path, overwrite=True)
    monkeypatch.setattr(os, "replace", real)
    assert not path.exists()
    assert FunnelIndex.open(path).text(3) == "first"
    FunnelIndex.build(vectors(1, 50), path, texts=["second"] * 50, overwrite=True)
    assert FunnelIndex.open(path).text(3) == "second"
    assert os.listdir(tmp_path) == ["index"]


def test_a_killed_export_is_cleaned_up(start):
    for name in (".small.partial-99999999", f".small.partial-{os.getppid()}"):
        (start / name).mkdir()
    TwoDMSEModel.from_pretrained(start / "model").export(start / "small", 2)
    left = sorted(name for name in os.listdir(start) if "partial" in name)
    assert left == [f".small.partial-{os.getppid()}"], "that process still runs"


def test_ids_take_room_in_proportion_to_their_bytes(tmp_path):
    ids = [f"n{i}" for i in range(2000)] + ["long" * 25_000, "a\0", "a"]
    FunnelIndex.build(vectors(0, len(ids)), tmp_path / "index", ids=ids)
    assert sum(path.stat().st_size for path in (tmp_path / "index").glob("id*")) < 250_000
    index = FunnelIndex.open(tmp_path / "index")
    assert index.search(vectors(0, len(ids))[[2000, 2001, 2002]], 1)[1][:, 0].tolist() == ids[2000:]


def test_accelerate_shows_the_line_last(tmp_path):
    accelerate = shutil.which("accelerate", path=os.path.dirname(sys.executable)) or pytest.skip(
        "no accelerate command"
    )
    command = [accelerate, "launch", "--quiet", "--cpu", "--num_processes", "1", str(ROOT / "run_scripts/finetune.py")]
    done = subprocess.run([*command, "--nonsense", "1"], env=cpu_environment(ROOT), capture_output=True, text=True,
                          cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "finetune.py: error: flags: --nonsense is unknown; --help lists the flags"
