"""mine_negatives.py as a user runs it: end to end, and every wrong input in one line."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset, concatenate_datasets

from modeling_2dmse import TwoDMSEModel
from run_scripts.mine_negatives import FORMATS, main, write_table
from trainer import mining
from trainer.data import check_table
from trainer.shared.tables import read_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path, tiny_model):
    """A model with a ladder, a small table, and the flags of a run that works."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    rows = {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}
    rows = {name: [*texts, texts[0]] for name, texts in rows.items()}
    rows["positive"][-1] = SENTENCES[3].upper()  # the first anchor's second positive
    Dataset.from_dict(rows).to_csv(tmp_path / "pairs.csv", index=False)
    return {
        "--model_name_or_path": [str(tmp_path / "model")],
        "--train_file": [str(tmp_path / "pairs.csv")],
        "--output_file": [str(tmp_path / "out" / "mined.jsonl")],
        "--range_min": ["1"],
        "--num_negatives": ["2"],
    }


def flags(settings: dict) -> list[str]:
    return [word for name, values in settings.items() for word in (name, *values)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_end_to_end(suffix, files, tmp_path, capsys):
    path = tmp_path / "out" / f"mined{suffix}"
    main(flags(files | {"--output_file": [str(path)]}))
    table = check_table(read_table(str(path)))
    assert table.column_names == ["anchor", "positive", "negative", "negative_1"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    # compared with a plain loop at the smallest size of the ladder
    model, pairs = TwoDMSEModel.from_pretrained(tmp_path / "model"), read_table(str(tmp_path / "pairs.csv"))
    assert table.select_columns(["anchor", "positive"]).to_dict() == pairs.to_dict()
    documents = SENTENCES[1::2]
    cosine = model.encode(table["anchor"], 1, 8) @ model.encode(documents, 1, 8).T
    for row, example in enumerate(table):
        positives = {example["positive"].lower(), *([SENTENCES[1], SENTENCES[3]] if row in (0, 10) else [])}
        left = [documents[i] for i in (-cosine[row]).argsort(kind="stable") if documents[i] not in positives]
        assert [example["negative"], example["negative_1"]] == left[1:3]
    printed = capsys.readouterr().out
    assert "11 rows, 10 anchors, 10 documents; at 1x8" in printed
    assert "0 rows dropped, with fewer than 2 left (range_min 1, range_max 100)" in printed


def test_a_bar_of_one_step_is_hidden(tmp_path, monkeypatch, capsys):
    bars = sys.modules["datasets.utils.tqdm"]
    monkeypatch.setattr(bars, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)  # scripts set it without a terminal
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)
    table = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES})
    for suffix in FORMATS:
        write_table(table, str(tmp_path / f"short{suffix}"))
    vectors = torch.eye(4)
    searched = []
    monkeypatch.setattr(
        mining.logging, "tqdm", lambda **kwargs: searched.append(kwargs["disable"]) or nullcontext(Bar())
    )
    for chunk in (4, 2):
        list(mining.top_candidates(vectors, vectors, 1, [[]] * 4, query_chunk=chunk))
    assert searched == [True, None]
    assert capsys.readouterr().err == ""
    write_table(concatenate_datasets([table] * 51), str(tmp_path / "long.csv"))
    assert "2/2" in capsys.readouterr().err


class Bar:
    """A bar that is not drawn."""

    def update(self):
        pass


def test_awkward_texts_survive_in_every_format(files, tmp_path):
    texts = ["a\rman", 'says "guitar"', "dogs,\nrun", " NA", "null", "a train\u2028"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    change = {"--corpus_file": [str(tmp_path / "corpus.jsonl")], "--num_negatives": ["6"], "--range_min": ["0"]}
    for suffix in FORMATS:
        path = str(tmp_path / f"mined.jsonl{suffix}")  # only the last suffix counts
        main(flags(files | change | {"--output_file": [path]}))
        table = check_table(read_table(path))
        assert len(table) == 11
        assert all({row[name] for name in table.column_names[2:]} == set(texts) for row in table)


def test_rows_with_too_few_negatives_are_dropped_and_counted(files, tmp_path, capsys):
    main(flags(files | {"--num_negatives": ["8"], "--sampling": ["random"]}))
    table = read_table(files["--output_file"][0])
    assert len(table) == 9  # eight documents are left for the anchor with two positives, and one of them is skipped
    assert SENTENCES[0] not in table["anchor"]
    assert "2 rows dropped, with fewer than 8 left" in capsys.readouterr().out


def test_seed_size_and_overwrite(files, tmp_path, capsys):
    path = Path(files["--output_file"][0])
    random = files | {"--sampling": ["random"], "--size": ["2x16"]}
    runs = []
    for seed in ("0", "0", "1"):
        main(flags(random | {"--seed": [seed], "--overwrite": ["true"]}))
        runs.append(path.read_bytes())
    assert runs[0] == runs[1] != runs[2]
    assert "at 2x16" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(flags(files))
    assert "mined.jsonl exists; choose another or pass --overwrite true" in capsys.readouterr().err
    assert path.read_bytes() == runs[2]


def test_a_beir_folder(files, tmp_path):
    (tmp_path / "qrels").mkdir()
    for name, texts in (("queries", SENTENCES[::2]), ("corpus", SENTENCES[1::2])):
        rows = [{"_id": f"{i}", "title": "", "text": text} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = "query-id\tcorpus-id\tscore\n"
    (tmp_path / "qrels" / "train.tsv").write_text(head + "0\t0\t1\n0\t5\t1\n3\t3\t1\n")
    (tmp_path / "qrels" / "test.tsv").write_text(head + "0\t9\t1\n")
    del files["--train_file"]
    every = {"--num_negatives": ["7"], "--range_min": ["0"], "--beir_dir": [str(tmp_path)]}
    main(flags(files | every))
    table = check_table(read_table(files["--output_file"][0]))
    assert table["anchor"][:] == [SENTENCES[0], SENTENCES[0], SENTENCES[6]]
    assert table["positive"][:] == [SENTENCES[1], SENTENCES[11], SENTENCES[7]]
    first = {table[0][name] for name in table.column_names[2:]}
    assert first == set(SENTENCES[1::2]) - {SENTENCES[1], SENTENCES[11], SENTENCES[19]}


def wrong_inputs():
    return {
        "missing file": ({"--train_file": ["absent.csv"]}, "train_file: absent.csv is not a file"),
        "two sources": ({"--beir_dir": ["x"]}, "train_file: name the pairs with either --train_file or --beir_dir"),
        "scores": ({"--train_file": ["{tmp}/scored.csv"]}, "scored.csv needs the columns (anchor, positive)"),
        "no corpus": ({"--corpus_file": ["absent.jsonl"]}, "corpus_file: absent.jsonl is not a file"),
        "no texts": ({"--corpus_file": ["{tmp}/scored.csv"]}, "scored.csv has no column text among sentence1"),
        "format": ({"--output_file": ["{tmp}/out/x.txt"]}, "unknown format; use one of .csv, .csv.gz, .jsonl"),
        "packed parquet": ({"--output_file": ["{tmp}/out/x.parquet.gz"]}, "output_file: "),
        "existing": ({"--output_file": ["{tmp}/pairs.csv"]}, "pairs.csv exists; choose another or pass --overwrite"),
        "folder": ({"--output_file": ["{tmp}/folder.csv"]}, "folder.csv is a folder"),
        "layers": ({"--size": ["5x8"]}, "error: size: 5x8 asks for 5 layers, but the backbone has 1 to 4"),
        "dims": ({"--size": ["1x33"]}, "error: size: 1x33 asks for 33 dimensions, but the backbone has 1 to 32"),
        "malformed": ({"--size": ["8"]}, "error: size: '8' is not a size; write LAYERSxDIM"),
        "ranks": (
            {"--range_min": ["20"], "--range_max": ["20"]},
            "range_max: 20 must be at least range_min + num_negatives, 20 + 2",
        ),
        "sampling": ({"--sampling": ["best"]}, "sampling: 'best' is unknown; choose one of top, random"),
        "number": ({"--margin": ["much"]}, "argument --margin: invalid float value: 'much'"),
        "batch": ({"--batch_size": ["0"]}, "batch_size: 0 is not allowed"),
        "length": ({"--max_length": ["0"]}, "max_length: 0 is not allowed"),
        "small corpus": ({"--range_min": ["9"]}, "range_min: skipping 9 ranks leaves fewer than 2 of the corpus"),
        "filters": (
            {"--max_score": ["-1"], "--margin": ["0.5"]},
            "no row has 2 negatives left with range_min 1, range_max 100, margin 0.5, max_score -1.0; widen",
        ),
        "model": ({"--model_name_or_path": ["./absent"]}, "model_name_or_path: ./absent does not exist"),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_input_ends_in_one_line(case, files, tmp_path, capsys):
    (tmp_path / "scored.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    (tmp_path / "folder.csv").mkdir()
    change, message = wrong_inputs()[case]
    change = {name: [value.replace("{tmp}", str(tmp_path)) for value in values] for name, values in change.items()}
    with pytest.raises(SystemExit) as caught:
        main(flags(files | change))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".partial" or path.stem in ("mined", "x")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "train_file: name the pairs with either --train_file or --beir_dir"),
        (["--beir_dir", "absent"], "error: beir_dir: absent is not in BEIR layout: absent/corpus.jsonl is missing"),
        (["--beir_dir", "{tmp}", "--beir_split", "dev"], "qrels/dev.tsv is missing"),
        (["--beir_dir", "{tmp}"], "has no relevant document in its split train"),
        (["--beir_dir", "{tmp}/broken"], "corpus.jsonl is not JSON: Expecting value: line 1"),
        (["--beir_dir", "{tmp}", "--corpus_file", "x"], "corpus_file: the folder of --beir_dir has its own corpus"),
    ],
)
def test_wrong_beir_folders(change, message, files, tmp_path, capsys):
    for folder, line in ((tmp_path, '{"_id": "1", "text": "a"}\n'), (tmp_path / "broken", "not json\n")):
        (folder / "qrels").mkdir(parents=True)
        (folder / "queries.jsonl").write_text(line)
        (folder / "corpus.jsonl").write_text(line)
        (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t0\n")
    del files["--train_file"]
    with pytest.raises(SystemExit, match="2"):
        main(flags(files) + [word.replace("{tmp}", str(tmp_path)) for word in change])
    assert message in capsys.readouterr().err


def test_exit_code_of_the_real_program(tmp_path):
    program = [sys.executable, str(ROOT / "run_scripts" / "mine_negatives.py")]
    wrong = subprocess.run(
        [*program, "--nonsense"], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert wrong.stderr.strip().splitlines()[-1].startswith("mine_negatives.py: error: ")
