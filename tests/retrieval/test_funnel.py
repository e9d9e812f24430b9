"""The funnel finds what exact search finds, names what is wrong with its input, and detects damaged files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from retrieval import FunnelIndex, parse_stages
from retrieval.stages import select

WIDTH = 48


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def cosine(queries, documents, dim):
    """Cosine similarity in float64, by definition."""
    cut = [np.asarray(rows, dtype=np.float64)[:, :dim] for rows in (queries, documents)]
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in cut)
    return a @ b.T


def ranked(scores: np.ndarray, among=None) -> list[int]:
    """Positions by score, then by position."""
    return sorted(range(len(scores)) if among is None else among, key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("count", [1, 7, 300, 20_000])
def test_one_stage_at_full_width_is_exact_search(count, tmp_path):
    documents, queries = vectors(count), vectors(5, seed=1)
    index = FunnelIndex.build(documents, tmp_path / "index")
    k = min(10, count)
    scores, ids = index.search(queries, k)
    expected = cosine(queries, documents, WIDTH)
    for row in range(5):
        best = ranked(expected[row])[:k]
        assert ids[row].tolist() == best
        assert np.allclose(scores[row], expected[row, best], atol=1e-6)
    alone = index.search(queries[2], k)
    assert alone[1].tolist() == ids[2].tolist()


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("stored", [True, False])
def test_stages_equal_a_loop(precision, stored, tmp_path):
    documents, queries = vectors(3000), vectors(4, seed=1)
    prefixes = [(20, precision)] if stored else []
    index = FunnelIndex.build(documents, tmp_path / "index", prefixes=prefixes)
    scores, ids = index.search(queries, 5, [(20, 200, precision), (32, 50), (WIDTH, 5)])
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents)]
    for row in range(4):
        if precision == "binary":
            first = ((unit[0][row, :20] > 0) == (unit[1][:, :20] > 0)).sum(axis=1)
        else:
            first = cosine(queries[row : row + 1], documents, 20)[0]
        if precision == "int8":
            cut = unit[1][:, :20] / np.linalg.norm(unit[1][:, :20], axis=1, keepdims=True)
            first = np.clip(np.rint(cut * 127 * 20**0.5 / 4), -127, 127) @ queries[row, :20].astype(np.float64)
        kept = ranked(first)[:200]
        kept = ranked(cosine(queries[row : row + 1], documents, 32)[0], kept)[:50]
        last = cosine(queries[row : row + 1], documents, WIDTH)[0]
        kept = ranked(last, kept)[:5]
        assert ids[row].tolist() == kept
        assert np.allclose(scores[row], last[kept], atol=1e-6)
    assert len(index.seconds) == 3


def test_keeping_all_equals_exact_search_at_the_last_stage(tmp_path):
    documents, queries = vectors(500), vectors(3, seed=1)
    index = FunnelIndex.build(documents, tmp_path / "index", prefixes=[8])
    exact = index.search(queries, 20)
    for keep in (500, 10_000):
        found = index.search(queries, 20, [(8, keep), (WIDTH, keep)])
        assert np.array_equal(found[1], exact[1])


def test_equal_scores_are_ordered_by_id(tmp_path, monkeypatch):
    documents = np.repeat(vectors(2), 300, axis=0)
    names = [f"n{i:03d}" for i in np.random.default_rng(0).permutation(600)]
    for prefixes, stages in (
        ((), None),
        ([8], [(8, 40), (WIDTH, 12)]),
        ([(8, "binary")], [(8, 30, "binary"), (8, 12)]),
    ):
        index = FunnelIndex.build(documents, tmp_path / "index", prefixes=prefixes, ids=names, overwrite=True)
        for block in (2**23, 700):  # the second one uses several blocks
            monkeypatch.setattr("retrieval.funnel._SCORES", block)
            _, ids = index.search(documents[:1], 12, stages)
            assert ids[0].tolist() == sorted(names[:300])[:12]


def test_the_selection_equals_a_sort():
    rng = np.random.default_rng(0)
    for count in (1, 255, 256, 5000):
        for scores in (rng.normal(size=count), rng.integers(0, 4, size=count).astype(float)):
            for keep in {1, min(7, count), count}:
                assert select(scores, keep).tolist() == ranked(scores)[:keep]


def test_blocks_give_the_index_of_one_array_and_inputs_are_not_changed(tmp_path):
    documents, queries = vectors(1000), vectors(2, seed=1)
    before = documents.copy(), queries.copy()
    whole = FunnelIndex.build(documents, tmp_path / "a", prefixes=[16])
    parts = FunnelIndex.build(iter([documents[:1], documents[1:700], documents[700:]]), tmp_path / "b", prefixes=[16])
    assert {name: entry["crc32"] for name, entry in whole.meta["files"].items()} == {
        name: entry["crc32"] for name, entry in parts.meta["files"].items()
    }
    documents.setflags(write=False)
    queries.setflags(write=False)
    found = [index.search(queries, 3, [(16, 30), (WIDTH, 3)]) for index in (whole, FunnelIndex.open(tmp_path / "b"))]
    assert np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(documents, before[0])
    assert np.array_equal(queries, before[1])


def test_ids_and_texts_come_back(tmp_path):
    texts = ["a cat", "", "größer\nals", "日本"]
    index = FunnelIndex.build(vectors(4), tmp_path / "index", ids=["x", "y", "a", "b"], texts=texts)
    index = FunnelIndex.open(tmp_path / "index")
    assert [index.text(name) for name in ("x", "y", "a", "b")] == texts
    with pytest.raises(ValueError, match="texts: this index was built without them"):
        FunnelIndex.build(vectors(4), tmp_path / "bare").text(0)


def test_wrong_searches_end_in_one_clear_error(tmp_path):
    index = FunnelIndex.build(vectors(20), tmp_path / "index", prefixes=[8])
    query = vectors(1, seed=1)
    broken = query.copy()
    broken[0, 3] = np.nan
    for arguments, message in (
        ((query, 21), "k: 21 is not allowed; this index has 20 vectors, so use 1 to 20"),
        ((query, 0), "k: 0 is not allowed"),
        ((query, 5, [(8, 5), (WIDTH, 10)]), "stages: 8:5,48:10 keeps more in a later stage than in an earlier one"),
        ((query, 5, [(8, 10), (WIDTH, 4)]), "stages: 8:10,48:4 keeps 4 in the last stage, fewer than k"),
        ((query, 5, [(49, 10)]), "stages: 49 dimensions in 49:10 are not allowed; the vectors have 48"),
        ((query, 5, [(8, 10, "int4")]), "stages: 'int4' is unknown; choose one of float32, int8, binary, approximate"),
        ((query, 5, [(8, 10), (8, 5, "int8")]), "only the first stage may be int8"),
        ((query[:, :40], 5), r"queries: a shape of \(1, 40\) is not allowed; use \(rows, 48\)"),
        ((np.zeros((2, WIDTH)), 5), "queries: the vector in row 0 is zero"),
        ((broken, 5), "queries: the vector in row 0 is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(*arguments)
    for text in ("32", "32:x", "a:3", ""):
        with pytest.raises(ValueError, match="is not DIM:KEEP"):
            parse_stages(text)


@pytest.mark.parametrize("spec", ["HNSW16", "IVF8,Flat"])
def test_a_graph_finds_nearly_what_exact_search_finds(spec, tmp_path):
    centres = vectors(20)
    documents = centres[np.arange(2000) % 20] + 0.3 * vectors(2000, seed=2)
    queries = documents[:50] + 0.1 * vectors(50, seed=3)
    FunnelIndex.build(documents, tmp_path / "index", prefixes=[16], approximate=(16, spec))
    index = FunnelIndex.open(tmp_path / "index")
    exact = index.search(queries, 10, [(16, 100), (WIDTH, 10)])
    found = index.search(queries, 10, [(16, 100, "approximate"), (WIDTH, 10)])
    same = [len(set(a) & set(b)) for a, b in zip(exact[1].tolist(), found[1].tolist(), strict=True)]
    assert np.mean(same) >= 9.5
    with pytest.raises(ValueError, match="needs a graph of 24 dimensions; this index has one of 16"):
        index.search(queries, 10, [(24, 100, "approximate")])
    if spec.startswith("IVF"):  # it only searches some of its lists
        with pytest.raises(ValueError, match=r"the graph found .* keep fewer"):
            index.search(queries, 10, [(16, 2000, "approximate")])
    content = bytearray((tmp_path / "index" / "graph.faiss").read_bytes())
    content[1000] ^= 1
    (tmp_path / "index" / "graph.faiss").write_bytes(content)
    with pytest.raises(ValueError, match=r"graph\.faiss is damaged"):
        FunnelIndex.open(tmp_path / "index")


def test_a_graph_needs_faiss_and_a_known_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs a graph of 8 dimensions; this index has none"):
        FunnelIndex.build(vectors(9), tmp_path / "a").search(vectors(1), 3, [(8, 5, "approximate")])
    with pytest.raises(ValueError, match="'HNZW' is not understood by FAISS"):
        FunnelIndex.build(vectors(9), tmp_path / "b", approximate=(8, "HNZW"))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="FAISS is missing; pip install"):
        FunnelIndex.build(vectors(9), tmp_path / "b", approximate=(8, "HNSW8"))
    assert not (tmp_path / "b").exists()


def test_wrong_vectors_leave_nothing_behind(tmp_path):
    documents = vectors(20)
    documents[13] = 0
    other = vectors(20)
    other[7, 2] = np.inf
    for arguments, message in (
        ({"embeddings": documents}, "embeddings: the vector in row 13 is zero"),
        ({"embeddings": iter([vectors(9), other])}, "embeddings: the vector in row 16 is not finite"),
        ({"embeddings": iter([vectors(9), vectors(9, width=40)])}, r"a shape of \(9, 40\) is not allowed"),
        ({"embeddings": iter([])}, "embeddings: there are no vectors"),
        ({"embeddings": vectors(5), "ids": ["a"]}, "ids: 1 are given for 5 vectors"),
        ({"embeddings": vectors(2), "ids": ["a", "a"]}, "ids: 'a' appears twice; ids must be distinct"),
        ({"embeddings": vectors(5), "prefixes": [64]}, "prefixes: 64 is not allowed"),
        ({"embeddings": vectors(5), "prefixes": [(8, "int4")]}, "prefixes: 'int4' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            FunnelIndex.build(path=tmp_path / "index", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_has_appeared_during_a_build_is_not_replaced(tmp_path):
    path = tmp_path / "index"

    def blocks():
        yield vectors(5)
        path.mkdir()
        (path / "mine.txt").write_text("mine")

    for overwrite, message in ((False, "exists; name another folder"), (True, "is not an index, so it is not overwr")):
        with pytest.raises(ValueError, match=message):
            FunnelIndex.build(blocks(), path, overwrite=overwrite)
        assert (path / "mine.txt").read_text() == "mine"
        (path / "mine.txt").unlink()
        path.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_keeps_the_old_index(tmp_path):
    path, documents = tmp_path / "index", vectors(30)
    FunnelIndex.build(documents, path)
    with pytest.raises(ValueError, match="exists; name another folder, or overwrite it"):
        FunnelIndex.build(documents, path)
    with pytest.raises(ValueError, match="is zero"):
        FunnelIndex.build(np.zeros((3, WIDTH)), path, overwrite=True)
    assert len(FunnelIndex.open(path)) == 30
    assert len(FunnelIndex.build(documents[:9], path, overwrite=True)) == 9
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="is not an index, so it is not overwritten"):
        FunnelIndex.build(documents, tmp_path / "mine", overwrite=True)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "index"

    def fresh():
        FunnelIndex.build(vectors(30), path, prefixes=[8], model={"name": "m", "num_layers": 2}, overwrite=True)

    def change(name, edit):
        fresh()
        content = bytearray((path / name).read_bytes())
        (path / name).write_bytes(edit(content))

    def flip(content):
        content[100] ^= 1
        return content

    for name in ("vectors.f32", "prefix-8.float32"):
        for edit, message in ((flip, "is damaged, its checksum is wrong"), (lambda c: c[:-4], "truncated or changed")):
            change(name, edit)
            with pytest.raises(ValueError, match=message):
                FunnelIndex.open(path)
    change("index.json", lambda c: c[:40])
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        FunnelIndex.open(path)
    fresh()
    meta = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(meta | {"format": 3}))
    with pytest.raises(ValueError, match="is an index of format 3; this version reads formats 1 and 2"):
        FunnelIndex.open(path)
    fresh()
    (path / "prefix-8.float32").unlink()
    with pytest.raises(ValueError, match=r"prefix-8\.float32 is missing"):
        FunnelIndex.open(path)
    fresh()
    FunnelIndex.open(path, model={"name": "m", "num_layers": 2})
    with pytest.raises(ValueError, match=r"was built with .*'num_layers': 2.*, not with .*'num_layers': 3"):
        FunnelIndex.open(path, model={"name": "m", "num_layers": 3})
    with pytest.raises(ValueError, match=r"has no index\.json"):
        FunnelIndex.open(tmp_path)


def test_a_killed_build_leaves_the_old_index(tmp_path):
    path = tmp_path / "index"
    FunnelIndex.build(vectors(30), path)
    code = (
        "import os, sys, numpy as np; from retrieval import FunnelIndex\n"
        "def blocks():\n"
        "    yield np.ones((50, 48))\n"
        "    os.kill(os.getpid(), 9)\n"
        f"FunnelIndex.build(blocks(), {str(path)!r}, overwrite=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert done.returncode == -9
    assert len(FunnelIndex.open(path)) == 30
