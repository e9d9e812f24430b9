"""encode.py: every size from one pass, and the same files after a killed run and from several processes."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, cpu_environment
from forking import ForkedScript, finish, kill, start_group

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.formats import quantize
from retrieval.shards import read_shards
from run_scripts import encode

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"{sentence} {i}" for i in range(3) for sentence in SENTENCES]


@pytest.fixture
def start(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path


def flags(folder: Path, name: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(folder / "model"), "--input", str(folder / "texts.txt"),
        "--output_dir", str(folder / name), "--sizes", "1x8", "2x8", "2x16", "4x32", "--shard_size", "7", *more,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "embeddings.json"
    }


def whole(folder: Path, size: str) -> tuple[list[str], np.ndarray]:
    ids, rows = zip(*read_shards(folder, size), strict=True)
    return [name for shard in ids for name in shard], np.concatenate(rows)


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_shards_hold_what_encode_returns(start, format, precision):
    encode.main(flags(start, "out", "--format", format, "--precision", precision))
    model = TwoDMSEModel.from_pretrained(start / "model")
    for num_layers, dim in ((1, 8), (2, 16), (4, 32)):
        ids, rows = whole(start / "out", f"{num_layers}x{dim}")
        assert ids == [str(i) for i in range(60)]
        expected = model.encode(TEXTS, num_layers, dim, convert_to_tensor=True)
        if precision == "float32":
            assert np.allclose(rows, expected.numpy(), atol=1e-6)
        else:
            close = quantize(expected, precision).numpy()
            assert rows.dtype == close.dtype
            assert (rows == close).mean() > 0.99  # a value on the edge may be rounded to either side


def test_a_second_run_encodes_only_what_has_changed(start, monkeypatch):
    encode.main(flags(start, "out"))
    before = contents(start / "out")
    calls = []
    embed = encode.embed
    monkeypatch.setattr(encode, "embed", lambda model, texts, *rest: calls.append(texts) or embed(model, texts, *rest))
    encode.main(flags(start, "out"))
    assert calls == []
    assert contents(start / "out") == before
    changed = [*TEXTS[:20], "another text", *TEXTS[21:-10]]
    (start / "texts.txt").write_text("\n".join(changed))
    encode.main(flags(start, "out"))
    assert calls == [changed[14:21], changed[49:]]
    assert whole(start / "out", "2x8")[0] == [str(i) for i in range(50)]
    broken = [line.encode() for line in ["changed", *changed[1:20]]] + [b"\xff"]
    (start / "texts.txt").write_bytes(b"\n".join([*broken, *(line.encode() for line in changed[20:])]))
    with pytest.raises(SystemExit, match="2"):
        encode.main(flags(start, "out"))
    with pytest.raises(ValueError, match="is not complete"):
        whole(start / "out", "2x8")
    (start / "texts.txt").write_text("\n".join(changed))
    encode.main(flags(start, "out"))
    encode.main(flags(start, "fresh"))
    assert contents(start / "out") == {**contents(start / "fresh"), "settings.json": before["settings.json"]}


def launch(folder: Path, name: str, processes: int) -> list[ForkedScript]:
    # As many threads as in this process: with another number, rounding differs.
    environment = cpu_environment(ROOT, OMP_NUM_THREADS=str(torch.get_num_threads()), HF_HUB_OFFLINE="1")
    script = folder / f"{name}-{time.monotonic_ns()}.py"
    script.write_text((ROOT / "run_scripts" / "encode.py").read_text())
    return start_group(script, flags(folder, name), environment, processes)


def test_a_killed_and_repeated_run_writes_the_files_of_one_run(start):
    encode.main(flags(start, "whole"))
    for shards in (1, 4):
        group = launch(start, "out", processes=1)
        while group[0].poll() is None and len(list((start / "out" / "done").glob("0*.json"))) < shards:
            time.sleep(0.001)
        kill(group)
    encode.main(flags(start, "out"))
    assert contents(start / "out") == contents(start / "whole")


def test_two_processes_write_the_files_of_one(start):
    encode.main(flags(start, "one"))
    printed, _ = finish(launch(start, "two", processes=2))
    assert 0 < int(re.search(r"(\d+) encoded here", printed)[1]) < len(TEXTS), "the first process did only a part"
    assert set(contents(start / "two")) == set(contents(start / "one"))
    for size in ("1x8", "4x32"):
        (ids, rows), (other_ids, other_rows) = whole(start / "two", size), whole(start / "one", size)
        assert ids == other_ids
        assert np.allclose(rows, other_rows, atol=1e-6)
    summaries = [json.loads((start / name / "embeddings.json").read_text()) for name in ("one", "two")]
    assert summaries[0] == summaries[1]


def test_malformed_lines_stop_or_are_skipped(start, capsys):
    lines = [text.encode() for text in TEXTS]
    (start / "texts.txt").write_bytes(b"\n".join([*lines[:10], b"\xff", *lines[10:]]))
    with pytest.raises(SystemExit, match="2"):
        encode.main(flags(start, "out"))
    assert "input: line 11 is malformed: byte 1 is not UTF-8; --on_error skip" in capsys.readouterr().err
    assert len(list((start / "out" / "done").glob("*.json"))) == 1, "the shard before it is kept"
    encode.main(flags(start, "out", "--on_error", "skip"))
    assert "line 11 was left out: byte 1 is not UTF-8" in capsys.readouterr().out
    assert whole(start / "out", "4x32")[0] == [str(i) for i in range(61) if i != 10]


def test_empty_texts_are_embedded_and_counted(start, capsys):
    (start / "corpus").mkdir()
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(["a man", "", "she is reading", " "])]
    (start / "corpus" / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encode.main([*flags(start, "out"), "--input", str(start / "corpus")])
    assert "2 of the texts are empty" in capsys.readouterr().out
    ids, vectors = whole(start / "out", "4x32")
    assert ids == ["d0", "d1", "d2", "d3"]
    expected = TwoDMSEModel.from_pretrained(start / "model").encode(["a man", "", "she is reading", ""])
    assert np.allclose(vectors, expected, atol=1e-6)


def test_wrong_input_ends_in_one_line(start, capsys):
    encode.main(flags(start, "out"))
    (start / "empty.txt").write_text("")
    (start / "mine").mkdir()
    (start / "mine" / "thesis.txt").write_text("years")
    for more, message in (
        (["--precision", "int8"], "has embeddings made with precision 'float32', not 'int8'; choose another folder"),
        (["--precision", "int4"], "precision: 'int4' is unknown"),
        (["--format", "csv"], "format: 'csv' is unknown; choose one of npy, parquet"),
        (["--on_error", "cry"], "on_error: 'cry' is unknown; choose one of stop, skip"),
        (["--shard_size", "0"], "shard_size: 0 is not allowed"),
        (["--batch_size", "0"], "batch_size: 0 is not allowed"),
        (["--sizes", "9x8"], "9x8"),
        (["--input", str(start / "none.txt")], "is not a file"),
        (["--input", str(start / "empty.txt"), "--output_dir", str(start / "e")], "has no texts"),
        (["--output_dir", str(start / "mine")], "holds something else; choose another folder"),
        (["--prompt_name", "query"], "prompt_name: 'query' is unknown"),
    ):
        with pytest.raises(SystemExit, match="2"):
            encode.main(flags(start, "out", *more))
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert (start / "mine" / "thesis.txt").read_text() == "years"
