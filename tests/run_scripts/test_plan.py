"""plan.py prints the costs and scores of every size, and one choice."""

import json

import pytest
from conftest import LADDER

from run_scripts import plan


@pytest.fixture
def folder(tiny_model, tmp_path):
    model = tiny_model()
    model.config.sizes = LADDER
    model.save_pretrained(tmp_path / "model")
    tasks = {"sts": {"a": {"spearman": {"1x8": 0.5, "2x16": 0.6, "4x32": 0.7}}}}
    (tmp_path / "results.json").write_text(json.dumps(tasks))
    (tmp_path / "texts.txt").write_text("a man plays\ntwo dogs run\n")
    return tmp_path


def flags(folder, *more):
    return ["--model_name_or_path", str(folder / "model"), "--texts", str(folder / "texts.txt"), *more]


def test_a_choice_with_its_reason(folder, capsys):
    more = ["--results", str(folder / "results.json"), "--corpus_size", "1000000", "--max_bytes_per_vector", "64"]
    plan.main(flags(folder, *more, "--output_dir", str(folder / "out")))
    out = capsys.readouterr().out
    assert "2x16: the best of 2 sizes within at most 64 bytes per vector" in out
    assert "num_layers=2).encode(texts, dim=16)" in out
    line = next(line for line in out.splitlines() if line.split()[:1] == ["4x32"])
    assert line.split()[1] == "0.7000"
    assert line.split()[8] == "0.128"
    rows = json.loads((folder / "out" / "plan.json").read_text())
    assert [row["size"] for row in rows] == LADDER
    assert rows[2]["on_front"], "the best score is on the front"
    assert (folder / "out" / "plan.png").stat().st_size > 5000
    plan.main(flags(folder, "--results", str(folder / "results.json"), "--sizes", "grid", "--min_score", "0.55"))
    assert "the fastest of 2 sizes that score at least 0.55" in capsys.readouterr().out


def test_wrong_input_ends_in_one_line(folder, capsys):
    (folder / "other.json").write_text("[]")
    for more, message in (
        (["--min_score", "0.5"], "min_score: name the scores with --results"),
        (["--results", str(folder / "none.json")], "none.json is not a file"),
        (["--results", str(folder / "other.json")], "is not a results.json of evaluate.py"),
        (["--max_ms_per_text", "-1"], "max_ms_per_text: -1.0 is not allowed"),
        (["--precision", "int4"], "precision: 'int4' is unknown"),
        (["--max_bytes_per_vector", "1"], "no size is within them; "),
    ):
        with pytest.raises(SystemExit, match="2"):
            plan.main(flags(folder, *more))
        assert message in capsys.readouterr().err.splitlines()[-1]
