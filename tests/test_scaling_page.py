"""docs/scaling.md: its tables are what its formulas give, and its bytes are those of an index."""

import contextlib
import io

import numpy as np
import pytest
from manual_blocks import ROOT, find_blocks

from retrieval import FunnelIndex

PAGE = ROOT / "docs" / "scaling.md"
COUNT = 2000


def test_the_tables_are_what_the_code_prints():
    (code,) = [block.text for block in find_blocks(PAGE, PAGE.read_text()) if block.language == "python"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    lines = printed.getvalue().splitlines()
    assert len(lines) == 9
    assert not set(lines) - set(PAGE.read_text().splitlines())


def test_the_bytes_per_passage_are_those_of_an_index(tmp_path):
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    vectors = np.random.default_rng(0).normal(size=(COUNT, 384)).astype(np.float32)
    more = {"ids": [f"{number:07d}" for number in range(COUNT)], "approximate": (64, "HNSW32")}
    FunnelIndex.build(vectors, tmp_path / "index", [32, (64, "int8"), (384, "binary"), (32, "binary")], **more)
    found = {path.name: path.stat().st_size / COUNT for path in (tmp_path / "index").iterdir()}
    exact = {"vectors.f32": 4 * 384, "prefix-32.float32": 4 * 32, "prefix-64.int8": 64}
    exact |= {"prefix-384.binary": 48, "prefix-32.binary": 8}
    assert {name: found[name] for name in exact} == exact
    assert found["graph.faiss"] == pytest.approx(4 * 64 + 8 * 32 + 16, rel=0.01)
    assert found["ids"] + found["id_offsets"] == pytest.approx(7 + 8, rel=0.01)
    assert "| graph `d:HNSWm` | 4d + 8m + 16 |" in PAGE.read_text()
