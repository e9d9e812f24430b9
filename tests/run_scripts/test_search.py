"""From a file of texts to results: encode.py, build_index.py, search.py."""

import io
import json

import numpy as np
import pytest
from conftest import SENTENCES

from modeling_2dmse import TwoDMSEModel
from retrieval import FunnelIndex
from run_scripts import build_index, encode, search


@pytest.fixture
def encoded(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"_id": f"d{i}", "title": "", "text": text}) for i, text in enumerate(SENTENCES)]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "corpus.jsonl").write_text("\n".join([*rows[:3], '{"_id": "bad"}', *rows[3:]]))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--input", str(tmp_path / "docs"), "--shard_size", "8"]
    more = ["--sizes", "1x8", "2x32", "--on_error", "skip", "--output_dir", str(tmp_path / "embeddings")]
    encode.main([*flags, *more])
    return tmp_path


def build(folder, *more):
    build_index.main(["--embeddings", str(folder / "embeddings"), "--output_dir", str(folder / "index"), *more])


def test_a_text_finds_itself(encoded, capsys):
    build(encoded, "--prefixes", "8", "16:binary", "--approximate", "8:HNSW8")
    for stages in (
        [],
        ["--stages", "8:12,32:5"],
        ["--stages", "16:15:binary,32:3"],
        ["--stages", "8:9:approximate,32:3"],
    ):
        capsys.readouterr()
        search.main([str(encoded / "index"), SENTENCES[4], SENTENCES[11], "--k", "3", *stages])
        lines = capsys.readouterr().out.splitlines()
        firsts = [line.split() for line in lines if line.startswith("  1")]
        assert [line[1:3] for line in firsts] == [["1.0000", "d4"], ["1.0000", "d11"]]
        assert " ".join(firsts[0][3:]) == SENTENCES[4]
        times = [line for line in lines if "encoding" in line]
        assert all(line.count(" ms") == 2 + bool(stages) for line in times)


def test_results_are_those_of_the_model(encoded, capsys):
    build(encoded)
    capsys.readouterr()
    search.main([str(encoded / "index"), "a question", "--k", "20"])
    rows = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[1:21]]
    model = TwoDMSEModel.from_pretrained(encoded / "model")
    scores = model.encode(SENTENCES, num_layers=2) @ model.encode("a question", num_layers=2)
    order = np.argsort(-scores)
    assert [name for _, name in rows] == [f"d{i}" for i in order]
    assert np.allclose([float(score) for score, _ in rows], scores[order], atol=1e-4)


def test_interactive_questions(encoded, capsys, monkeypatch):
    build(encoded, "--size", "1x8", "--with_texts", "false")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{SENTENCES[2]}\n\n{SENTENCES[7]}\n"))
    search.main([str(encoded / "index"), "--k", "1"])
    out = capsys.readouterr().out
    assert "1.0000  d2" in out
    assert "1.0000  d7" in out


def test_k_is_what_the_last_stage_keeps(encoded, capsys):
    build(encoded)
    for stages, k in (("8:12,32:3", 3), ("32:12", 12)):
        capsys.readouterr()
        search.main([str(encoded / "index"), SENTENCES[4], "--stages", stages])
        assert len(capsys.readouterr().out.splitlines()) == k + 3


@pytest.mark.parametrize("word", ["exit", "Quit ", "q", ":q", "exit()", "quit()"])
def test_a_word_ends_the_interactive_mode(encoded, capsys, monkeypatch, word):
    build(encoded, "--size", "1x8")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{SENTENCES[2]}\n{word}\n{SENTENCES[7]}\n"))
    capsys.readouterr()
    search.main([str(encoded / "index"), "--k", "1"])
    out = capsys.readouterr().out
    assert "1.0000  d2" in out
    assert "d7" not in out
    assert word not in out


def test_each_result_is_a_line_without_control_characters(encoded, capsys):
    row = json.dumps({"_id": "a\nb", "text": "\x1b[31mred\r\x9b2J text"})
    (encoded / "docs" / "corpus.jsonl").write_text(row)
    flags = ["--model_name_or_path", str(encoded / "model"), "--input", str(encoded / "docs")]
    encode.main([*flags, "--output_dir", str(encoded / "odd")])
    build_index.main(["--embeddings", str(encoded / "odd"), "--output_dir", str(encoded / "odd-index")])
    capsys.readouterr()
    search.main([str(encoded / "odd-index"), "a question"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  1")]
    assert line.split(maxsplit=2)[2] == "a b  [31mred 2J text"


def test_wrong_input_ends_in_one_line(encoded, capsys):
    index = str(encoded / "index")

    def fails(run, words, message):
        with pytest.raises(SystemExit, match="2"):
            run(words)
        assert message in capsys.readouterr().err.splitlines()[-1]

    base = ["--embeddings", str(encoded / "embeddings"), "--output_dir", index]
    fails(build_index.main, [*base, "--size", "3x8"], "size: 3x8 is not in")
    fails(build_index.main, [*base, "--prefixes", "x"], "prefixes: 'x' is not DIM")
    fails(build_index.main, [*base, "--prefixes", "64"], "prefixes: 64 is not allowed; the vectors have 1 to 32")
    fails(build_index.main, [*base, "--approximate", "HNSW8"], "approximate: 'HNSW8' is not DIM:NAME")
    fails(build_index.main, ["--embeddings", index, "--output_dir", index], "let encode.py finish first")
    build(encoded)
    fails(build_index.main, base, "exists; name another folder, or overwrite it")
    fails(search.main, [], "index: name the folder of an index as the first argument")
    fails(search.main, [str(encoded)], "has no index.json")
    fails(search.main, [index, "a", "--k", "21"], "k: 21 is not allowed; this index has 20 vectors")
    fails(search.main, [index, "a", "--stages", "8:5,32:10"], "keeps more in a later stage")
    fails(search.main, [index, "a", "--stages", "8"], "is not DIM:KEEP")
    FunnelIndex.build(np.ones((12, 4)), encoded / "bare")
    fails(search.main, [str(encoded / "bare"), "a"], "does not name the model that made it")
    other = TwoDMSEModel.from_pretrained(encoded / "model")
    other.backbone.get_input_embeddings().weight.data[7] += 0.1
    other.tokenizer.save_pretrained(encoded / "other")
    other.save_pretrained(encoded / "other")
    changed = [index, "a", "--model_name_or_path", str(encoded / "other")]
    fails(search.main, changed, "does not have the weights that made")
    lines = (encoded / "docs" / "corpus.jsonl").read_text().splitlines()
    changes = (lines[1:], [*lines[:-1], lines[-1].replace('"}', ' more"}')], [*lines, lines[0]])
    for changed in changes:
        (encoded / "docs" / "corpus.jsonl").write_text("\n".join(changed))
        fails(build_index.main, [*base, "--overwrite"], "has changed since it was encoded; encode it again")
    assert len(FunnelIndex.open(index)) == 20
