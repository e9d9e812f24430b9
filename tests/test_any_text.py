"""Any text in UTF-8 goes through files, encode.py and an index unchanged, and no notation crashes a parser."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import LADDER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_2dmse import Size, TwoDMSEModel, parse_ladder, parse_size
from retrieval import FunnelIndex, Stage, parse_stages
from retrieval.reading import Text, read_texts
from run_scripts import build_index, encode
from run_scripts.shared import checks
from trainer.shared.tables import read_table

# Every character except surrogates, which are not text. A reader reports texts of spaces only as malformed.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
TEXTS = st.lists(TEXT, min_size=1, max_size=8)
ID = TEXT.filter(lambda name: "\0" not in name)
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model(backbone_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=LADDER).save_pretrained(folder)
    return folder


def write(folder: Path, texts: list[str]) -> list[Path]:
    """The texts as tables of every format."""
    paths = [folder / f"a.{kind}" for kind in ("csv", "tsv", "jsonl", "parquet")]
    for path, delimiter in zip(paths, ",\t", strict=False):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerows([["text"], *([text] for text in texts)])
    paths[2].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), paths[3])
    return paths


@quick
@given(TEXTS)
def test_readers(texts):
    with tempfile.TemporaryDirectory() as folder:
        for path in write(Path(folder), texts):
            assert list(read_texts(str(path))) == [Text(str(i), text) for i, text in enumerate(texts)]


@settings(quick, max_examples=8)
@given(TEXTS)
def test_tables(texts):
    with tempfile.TemporaryDirectory() as folder:
        for path in write(Path(folder), texts)[2:]:  # pandas reads a NUL and a lone carriage return in its own way
            assert read_table(str(path))["text"][:] == texts


@quick
@given(st.lists(st.tuples(ID, TEXT), min_size=1, max_size=6, unique_by=lambda pair: pair[0]))
def test_indexes(pairs):
    names, texts = map(list, zip(*pairs, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.eye(len(pairs), 8, dtype=np.float32)
        FunnelIndex.build(vectors, f"{folder}/i", ids=names, texts=texts)
        index = FunnelIndex.open(f"{folder}/i")
        assert index.search(vectors, 1)[1][:, 0].tolist() == names
        assert [index.text(name) for name in names] == texts


@settings(quick, max_examples=15)
@given(texts=TEXTS)
def test_scripts(model, texts):
    expected = TwoDMSEModel.from_pretrained(model).encode(texts, 2, 16)
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(json.dumps({"id": f"n{i}", "text": text}) + "\n" for i, text in enumerate(texts))
        Path(folder, "a.jsonl").write_text(rows)
        more = ["--sizes", "2x16", "--output_dir", f"{folder}/e"]
        encode.main(["--model_name_or_path", str(model), "--input", f"{folder}/a.jsonl", *more])
        build_index.main(["--embeddings", f"{folder}/e", "--output_dir", f"{folder}/i"])
        index = FunnelIndex.open(f"{folder}/i")
        assert [index.text(f"n{i}") for i in range(len(texts))] == texts
        assert np.allclose(index.vectors, expected, atol=1e-6)


NOTATION = st.one_of(st.text(), st.from_regex(r"\A[0-9\u0660-\u0669\u00b2x:, -]{0,30}\Z"), st.integers().map(str))


@settings(quick, max_examples=400)
@given(NOTATION)
def test_sizes_and_stages_and_budgets(text):
    for parse, kind in (
        (parse_size, Size),
        (lambda t: parse_ladder([t])[0], Size),
        (lambda t: parse_stages(t)[0], Stage),
    ):
        found = answer(parse, text)
        assert isinstance(found, kind) or found.startswith(("sizes: ", "stages: "))
    found = answer(lambda t: checks.check_sizes([t]), text)
    assert found is None or found.startswith("sizes: ")
    found = answer(build_index._prefix, text)
    assert isinstance(found, tuple) or found.startswith("prefixes: ")


def answer(parse, text):
    """What a parser returns, or the message with which it refuses the text."""
    try:
        return parse(text)
    except ValueError as error:
        return str(error)


@quick
@given(st.builds(Size, st.integers(1, 99), st.integers(1, 9999)), st.integers(1, 9), st.integers(1, 9))
def test_what_is_written_is_read(size, dim, keep):
    assert parse_size(str(size)) == size
    stage = Stage(dim, keep, "int8")
    assert parse_stages(str(stage)) == [stage]
