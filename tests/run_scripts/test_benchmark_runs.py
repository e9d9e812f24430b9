"""Benchmarks through the command, with nothing of them replaced, on a tiny model."""

import importlib.util
import json

import pytest
from conftest import SENTENCES

from run_scripts import benchmark
from run_scripts.benchmarks import encode, growth


@pytest.fixture
def run(backbone_path, tmp_path):
    """A function from the words of the command to its rows by id, on the tiny BERT of the tests."""

    def rows(*words: str) -> dict[str, dict]:
        model = ["--model_name_or_path", backbone_path("bert"), "--sizes", "1x8", "4x32", "--max_length", "32"]
        benchmark.main([*words, *model, "--runs", "1", "--output_dir", str(tmp_path / "out")])
        written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
        return {line["id"]: line for line in written["rows"]}

    return rows


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(SENTENCES))
    return str(path)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnx_files_are_scored_and_timed(run, texts, tmp_path):
    pytest.importorskip("onnx")
    scored = tmp_path / "pairs.csv"
    pairs = zip(SENTENCES[::2], SENTENCES[1::2], strict=True)
    lines = ["sentence1,sentence2,score", *(f"{a},{b},{i % 4}" for i, (a, b) in enumerate(pairs))]
    scored.write_text("\n".join(lines))
    rows = run("encode", "--texts", texts, "--sts_files", str(scored))
    assert {"encode.fp32", "encode.onnx_float32", "encode.onnx_int8", "encode.best", "encode.depth"} <= set(rows)
    assert rows["encode.onnx_float32"]["spearman_lost"] <= encode.TOLERANCE
    assert all(line["min"] > 0 for name, line in rows.items() if "depth" not in name)


def test_the_hosts_work_is_timed_and_counted(run, texts, tmp_path):
    table = tmp_path / "rows.csv"
    lines = [f"{a},{b}" for a, b in zip(SENTENCES[::2], SENTENCES[1::2], strict=True)]
    table.write_text("\n".join(["anchor,positive", *lines]))
    rows = run("host", "--texts", texts, "--train_file", str(table))
    assert set(rows) == {"host.encode", "host.train", "host.train.again", "step.launches", "step.syncs"}
    assert all(rows[name]["min"] > 0 for name in ("host.encode", "host.train", "host.train.again"))
    assert 1 < rows["step.launches"]["ratio"] <= 1.5
    assert (rows["step.syncs"]["max"], rows["step.syncs"]["runs"]) == (0, 3)


def test_growth_is_measured_over_every_quantity(run, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "LENGTHS", (8, 16))
    monkeypatch.setattr(growth, "BATCHES", (2, 4))
    monkeypatch.setattr(growth, "BASE", {"length": 8, "batch": 2})
    rows = run("growth")
    names = ("length", "batch", "layers", "dims")
    assert set(rows) == {f"growth.{work}.{name}" for work in growth.WORK for name in names}
    assert all(min(line["seconds"]) > 0 for line in rows.values())
    assert (tmp_path / "out" / "growth.png").stat().st_size > 0
