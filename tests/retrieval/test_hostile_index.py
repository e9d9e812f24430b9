"""Folders of indexes and embeddings that somebody else has written: nothing outside them is opened."""

import json
import os
import zlib

import numpy as np
import pytest

from retrieval import FunnelIndex, approximate
from retrieval.shards import read_shards, read_summary
from run_scripts import build_index, search

COUNT, WIDTH = 40, 16


@pytest.fixture
def path(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(np.float32)
    names = [f"n{i}" for i in range(COUNT)]
    prefixes = [8, (16, "binary"), (8, "int8")]
    made = {"name": "model", "weights": 1, "num_layers": 2, "max_length": 8}
    folder = tmp_path / "index"
    FunnelIndex.build(vectors, folder, prefixes, ids=names, texts=names, model=made, approximate=(8, "HNSW8"))
    return folder


def rewrite(path, change) -> None:
    """Change index.json as an attacker would."""
    meta = json.loads((path / "index.json").read_text())
    changed = change(meta)
    (path / "index.json").write_text(json.dumps(meta if changed is None else changed))


def put(*keys, value):
    def change(meta):
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = value

    return change


def drop(*keys):
    def change(meta):
        for key in keys[:-1]:
            meta = meta[key]
        del meta[keys[-1]]

    return change


ENTRY = {"dtype": "|u1", "shape": [4], "crc32": zlib.crc32(b"mine")}
CHANGES = {
    **{f"file {name!r}": put("files", name, value=ENTRY) for name in ("../mine", "/etc/mine", "..", "a/b", "a\\b", "")},
    **{f"prefix {name!r}": put("prefixes", 0, "file", value=name) for name in ("../mine", "ids", 7, None)},
    **{f"no {name}": drop(name) for name in ("format", "count", "width", "model", "prefixes", "graph", "files")},
    **{f"no {name} of a file": drop("files", "vectors.f32", name) for name in ("dtype", "shape", "crc32")},
    **{f"no {name} of a prefix": drop("prefixes", 0, name) for name in ("dim", "precision", "file")},
    **{f"no {name} of the graph": drop("graph", name) for name in ("dim", "spec")},
    **{f"no file {name}": drop("files", name) for name in ("vectors.f32", "prefix-8.float32", "texts.utf8")},
    **{f"count {value!r}": put("count", value=value) for value in (-1, 0, True, "40", 39, 40.0, None)},
    **{f"width {value!r}": put("width", value=value) for value in (-1, 0, "16", 8, None)},
    **{f"dtype {value!r}": put("files", "ids", "dtype", value=value) for value in ("O", "|O", "f4,O", "M8[s]", 3, "(")},
    **{f"shape {value!r}": put("files", "ids", "shape", value=value) for value in ([], [-1], ["40"], [True], 40, [20])},
    "crc32": put("files", "ids", "crc32", value="0"),
    "entry": put("files", "ids", value=[1]),
    "files": put("files", value=[]),
    "model": put("model", value="model"),
    "prefixes": put("prefixes", value={}),
    "a prefix": put("prefixes", 0, value=8),
    "dim of a prefix": put("prefixes", 0, "dim", value=17),
    "precision": put("prefixes", 0, "precision", value="int4"),
    "graph": put("graph", value=8),
    "dim of the graph": put("graph", "dim", value="8"),
    "a list": lambda meta: [meta],
    "null": lambda meta: 7,
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", CHANGES)
def test_index_json(case, verify, path):
    (path.parent / "mine").write_bytes(b"mine")
    rewrite(path, CHANGES[case])
    with pytest.raises(ValueError, match=r"^path: .*(index\.json is damaged|build the index again)"):
        FunnelIndex.open(path, verify=verify)


def test_nested_too_deep(path):
    (path / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        FunnelIndex.open(path)


def test_offsets_that_lead_out_of_the_texts(path):
    offsets = np.arange(0, 8 * (COUNT + 1), 8, dtype=np.int64)
    (path / "text_offsets").write_bytes(offsets.tobytes())
    rewrite(path, put("files", "text_offsets", "crc32", value=zlib.crc32(offsets.tobytes())))
    with pytest.raises(ValueError, match="text_offsets does not fit"):
        FunnelIndex.open(path)


def test_a_graph_is_read_when_it_fits_alone(path, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    read = []
    real = faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda name: read.append(name) or real(name))
    query = np.ones(WIDTH)
    FunnelIndex.open(path).search(query, 2, [(8, 4, "approximate"), (16, 2)])
    assert len(read) == 1
    graph = (path / "graph.faiss").read_bytes()

    def graph_of(dim, count, metric):
        index = faiss.index_factory(dim, "HNSW8", metric)
        index.add(np.ones((count, dim), np.float32))
        faiss.write_index(index, str(tmp_path / "other"))
        return (tmp_path / "other").read_bytes()

    inner = faiss.METRIC_INNER_PRODUCT
    for content, named in (
        (graph[:-1] + bytes([graph[-1] ^ 1]), False),
        (graph_of(8, COUNT, inner), False),
        (graph_of(16, COUNT, inner), True),
        (graph_of(8, COUNT - 1, inner), True),
        (graph_of(8, COUNT + 1, inner), True),
        (graph_of(8, COUNT, faiss.METRIC_L2), True),
        (graph[:20], True),
        (b"", True),
    ):
        index = FunnelIndex.open(path)  # the file is changed after the index was opened
        (path / "graph.faiss").write_bytes(content)
        if named:  # an attacker also writes index.json
            entry = {"dtype": "|u1", "shape": [len(content)], "crc32": zlib.crc32(content)}
            rewrite(path, put("files", "graph.faiss", value=entry))
            index = FunnelIndex.open(path)
        read.clear()
        message = "is not a graph of 40 vectors of 8 dimensions" if named else "its checksum is wrong"
        with pytest.raises(ValueError, match=message):
            index.search(query, 2, [(8, 4, "approximate"), (16, 2)])
        assert read == []
        (path / "graph.faiss").write_bytes(graph)
        entry = {"dtype": "|u1", "shape": [len(graph)], "crc32": zlib.crc32(graph)}
        rewrite(path, put("files", "graph.faiss", value=entry))
    with pytest.raises(ValueError, match="is not a graph"):
        approximate.read_graph(path / "vectors.f32", 8, COUNT)


def test_overwriting_keeps_other_peoples_files(path):
    (path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"also has thesis\.txt, so it is not overwritten"):
        FunnelIndex.build(np.eye(4), path, overwrite=True)
    assert (path / "thesis.txt").read_text() == "years"
    assert len(FunnelIndex.open(path)) == COUNT
    rewrite(path, put("files", "thesis.txt", value=ENTRY))  # a name in index.json makes it no file of the index
    with pytest.raises(ValueError, match=r"also has thesis\.txt"):
        FunnelIndex.build(np.eye(4), path, overwrite=True)


def test_a_link_to_an_index_stays_one(path):
    link = path.parent / "link"
    link.symlink_to(path)
    FunnelIndex.build(np.eye(4), link, overwrite=True)
    assert link.is_symlink()
    assert len(FunnelIndex.open(path)) == 4
    assert sorted(os.listdir(path.parent)) == ["index", "link"]


def test_search_checks_what_the_index_says_of_its_model(path, capsys):
    for change in (drop("model", "name"), put("model", "weights", value="1"), put("model", "max_length", value=None)):
        before = (path / "index.json").read_text()
        rewrite(path, change)
        with pytest.raises(SystemExit, match="2"):
            search.main([str(path), "a query"])
        assert "index, model: " in capsys.readouterr().err
        (path / "index.json").write_text(before)


SUMMARY = {
    **{"rows": 2, "shards": 1, "sizes": ["1x4"], "format": "npy", "precision": "float32", "weights": 1},
    **{"model_name_or_path": "m", "max_length": 8, "input": "texts.txt", "text_column": "text", "id_column": None},
}


@pytest.fixture
def embeddings(tmp_path):
    for name in ("1x4", "ids"):
        (tmp_path / "e" / name).mkdir(parents=True)
    np.save(tmp_path / "e" / "1x4" / "00000.npy", np.eye(2, 4, dtype=np.float32))
    (tmp_path / "e" / "ids" / "00000.json").write_text('["a", "b"]')
    (tmp_path / "e" / "embeddings.json").write_text(json.dumps(SUMMARY))
    return tmp_path / "e"


def test_embeddings_json(embeddings, tmp_path, capsys):
    assert [ids for ids, _ in read_shards(embeddings, "1x4")] == [["a", "b"]]
    changes = [{"sizes": value} for value in (["../1x4"], ["1x4/.."], [], "1x4", [7], ["1x4", "/x"])]
    changes += [{"shards": value} for value in (-1, "1", None)] + [{"format": "pickle"}, {"weights": None}]
    texts = [json.dumps(SUMMARY | change) for change in changes]
    texts += [json.dumps({k: v for k, v in SUMMARY.items() if k != name}) for name in SUMMARY] + [
        "[]",
        "{",
        "[" * 99999,
    ]
    for text in texts:
        (embeddings / "embeddings.json").write_text(text)
        with pytest.raises(ValueError, match=r"embeddings\.json is damaged"):
            read_summary(embeddings)
        with pytest.raises(SystemExit, match="2"):
            build_index.main(["--embeddings", str(embeddings), "--output_dir", str(tmp_path / "index")])
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("ids", ['["a"]', '{"a": 1, "b": 2}', "[1, 2]", "7"])
def test_ids_that_do_not_fit(embeddings, ids):
    (embeddings / "ids" / "00000.json").write_text(ids)
    with pytest.raises(ValueError, match="its ids do not fit its rows"):
        list(read_shards(embeddings, "1x4"))


def test_no_pickle_is_loaded(embeddings):
    np.save(embeddings / "1x4" / "00000.npy", np.array([object(), object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        list(read_shards(embeddings, "1x4"))
