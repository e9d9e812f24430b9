"""build_index.py and search.py with the engines, and a Qdrant server that only notes down what it is asked."""

import http.server
import json
import threading

import numpy as np
import pytest
from conftest import SENTENCES

from modeling_2dmse import TwoDMSEModel
from retrieval.engines import Layout, open_engine
from run_scripts import build_index, encode, search

KEY = "the-key-of-the-cluster"
STAGES = "8:12,16:8,32:3"


@pytest.fixture(scope="module")
def encoded(backbone_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=["1x8", "2x32"]).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n".join(SENTENCES))
    flags = ["--model_name_or_path", str(folder / "model"), "--input", str(folder / "texts.txt")]
    encode.main([*flags, "--sizes", "2x32", "--shard_size", "8", "--output_dir", str(folder / "embeddings")])
    return folder


@pytest.fixture
def qdrant():
    return pytest.importorskip("qdrant_client", reason="the extra qdrant is not installed")


def results(capsys, *words) -> list[list[str]]:
    """Rank, score, id and text of each result."""
    capsys.readouterr()
    search.main(list(map(str, words)))
    return [line.split() for line in capsys.readouterr().out.splitlines() if line[:3].strip().isdigit()]


def test_both_engines_answer_the_same(encoded, tmp_path, capsys, qdrant):
    found = {}
    for engine in ("local", "qdrant"):
        flags = ["--embeddings", str(encoded / "embeddings"), "--prefixes", "8", "16", "--engine", engine]
        build_index.main([*flags, "--output_dir", str(tmp_path / engine)])
        assert "20 vectors of 32 dimensions" in capsys.readouterr().out
        where = (tmp_path / engine, SENTENCES[4], SENTENCES[11], "--engine", engine, "--k", "3")
        found[engine] = results(capsys, *where, "--stages", STAGES)
        found[engine] += results(capsys, *where)
    assert found["local"] == found["qdrant"]
    assert [line[1] for line in found["local"] if line[0] == "1"] == ["1.0000"] * 4
    build_index.main([*flags, "--output_dir", str(tmp_path / engine)])
    assert "20 vectors of 32 dimensions" in (out := capsys.readouterr().out)
    assert ", 0 of them new" in out


def test_queries_may_be_smaller_than_documents(encoded, tmp_path, capsys):
    build_index.main(["--embeddings", str(encoded / "embeddings"), "--output_dir", str(tmp_path / "index")])
    model = TwoDMSEModel.from_pretrained(encoded / "model")
    documents = model.encode(SENTENCES, num_layers=2)
    for size in ((1, 32), (1, 8), (4, 32)):
        layers, dim = size
        rows = results(capsys, tmp_path / "index", "a question", "--k", "20", "--query_size", f"{layers}x{dim}")
        cut = documents[:, :dim] / np.linalg.norm(documents[:, :dim], axis=1, keepdims=True)
        scores = cut @ model.encode("a question", num_layers=layers, dim=dim)
        assert [row[2] for row in rows] == [str(number) for number in np.argsort(-scores)]
        assert np.allclose([float(row[1]) for row in rows], np.sort(scores)[::-1], atol=1e-4)
    for flags, message in (
        (["--query_size", "9x8"], "query_size: 9x8 is not allowed; the model has 4 layers"),
        (["--query_size", "1x64"], "query_size: 1x64 is not allowed; the index has 32 dimensions"),
        (["--query_size", "small"], "query_size: 'small' is not a size"),
        (["--query_size", "1x8", "--stages", "8:9,32:3"], "needs more dimensions than queries of --query_size 1x8"),
    ):
        fails(search.main, [str(tmp_path / "index"), "a", *flags], message, capsys)


def fails(run, words, message, capsys) -> str:
    """The error output of a script that ends with exit code 2 and a line with the message."""
    with pytest.raises(SystemExit, match="2"):
        run(words)
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    return error


def test_wrong_flags_end_in_one_line(encoded, tmp_path, capsys, monkeypatch, qdrant):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    base = ["--embeddings", str(encoded / "embeddings")]
    server = [*base, "--engine", "qdrant", "--collection", "c", "--engine_url"]
    for words, message in (
        ([*base, "--engine", "mysql", "--output_dir", "x"], "engine: 'mysql' is unknown; choose one of local, qdrant"),
        ([*base, "--engine", "qdrant"], "output_dir: the engine qdrant needs a folder"),
        ([*base, "--engine_url", "http://localhost", "--output_dir", "x"], "engine_url: local has no URL here"),
        ([*server, "no url"], "engine_url: 'no url' is not a URL; write for example http://localhost:6333"),
        ([*server, "http://u:pw@localhost"], "engine_url: a user, password or query is not allowed in it"),
        ([*server, "http://localhost/?api_key=abcdef"], "engine_url: a user, password or query is not allowed in it"),
        ([*server, "http://a\udcff"], "engine_url: 'http://a\\udcff' has a host that is not allowed"),
        ([*server, "http://127.0.0.1:1", "--collection", "c\udcff"], "collection: 'c\\udcff' is not valid Unicode"),
        ([*server, "http://localhost:99999"], "is not a URL"),
        ([*server, "http://127.0.0.1:1"], "engine_url: http://127.0.0.1:1 cannot be reached"),
        ([*server, "http://127.0.0.1:1", "--engine_api_key_env", "NONE"], "environment variable 'NONE' is not set"),
        ([*server, "http://127.0.0.1:1", "--engine_options", "[1]"], "engine_options: [1] is not allowed"),
        (
            [*server, "http://127.0.0.1:1", "--engine_options", "{a: 1}"],
            "engine_options: a is unknown; choose from sha",
        ),
        (
            [*base, "--engine", "qdrant", "--output_dir", str(tmp_path / "other")],
            "has something else than a collection",
        ),
        ([*base, "--prefixes", "8:float16", "--output_dir", str(tmp_path / "x")], "prefixes: 'float16' is unknown"),
        ([*base, "--approximate", "8:HNSW4", "16:HNSW4", "--output_dir", "x"], "the local engine has one graph"),
    ):
        fails(build_index.main, words, message, capsys)
    fails(search.main, ["index", "a", "--engine", "qdrant"], "there is no index; build it", capsys)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    fails(search.main, ["table", "a", "--engine", "pgvector"], "variable 'DATABASE_URL' is not set", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("part", ["meta.json", "collection/index/storage.sqlite"])
def test_a_damaged_local_collection_is_named(part, encoded, tmp_path, capsys, qdrant):
    words = ["--embeddings", str(encoded / "embeddings"), "--engine", "qdrant", "--output_dir", str(tmp_path / "index")]
    build_index.main(words)
    path = tmp_path / "index" / part
    whole = path.read_bytes()
    damages = [b"[]", b"{}", b"\xff", whole[:-20]] if part == "meta.json" else [b"x" * 1000, whole[: len(whole) // 2]]
    for damage in damages:
        path.write_bytes(damage)
        for run, flags in ((build_index.main, words), (search.main, [str(tmp_path / "index"), "a", *words[2:4]])):
            fails(run, flags, f"engine: {tmp_path / 'index'} is damaged: ", capsys)
    if part != "meta.json":
        path.unlink()
        fails(search.main, [str(tmp_path / "index"), "a", *words[2:4]], "it has 0 of its 20 vectors", capsys)


class Noting(http.server.BaseHTTPRequestHandler):
    """Answers as Qdrant does, and notes down each request with its key and content."""

    def do(self):
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(content) if content else None
        self.server.asked.append((self.command, self.path.partition("?")[0], self.headers.get("api-key"), body))
        if self.headers.get("api-key") != KEY:
            self.reply(401, {"status": {"error": "Unauthorized"}})
            return
        path, state = self.path.partition("?")[0], self.server.state
        if self.command == "PUT" and path == "/collections/pages":
            state["metadata"] = body["metadata"]
        if self.command == "PATCH":
            state["metadata"] |= body["metadata"]
        answers = {
            "/collections/pages/exists": {"exists": "metadata" in state},
            "/collections/pages/points/count": {"count": 4},
            "/collections/pages/points/query/batch": [
                {"points": [{"id": number, "version": 1, "score": 0.5, "payload": {"id": "d"}} for number in range(2)]}
            ],
            "/collections/pages": self.server.info(state["metadata"]) if "metadata" in state else None,
        }
        is_write = self.command in ("PUT", "PATCH")
        written = True if path == "/collections/pages" else {"operation_id": 1, "status": "completed"}
        self.reply(200, {"result": written if is_write else answers.get(path, []), "status": "ok", "time": 0.1})

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Nothing."""

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do


def collection_info(metadata):
    """The answer of GET /collections/NAME, as far as the client insists on it."""
    hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000}
    optimizer = {"deleted_threshold": 0.2, "vacuum_min_vector_number": 1, "default_segment_number": 0,
                 "flush_interval_sec": 5}  # fmt: skip
    config = {"params": {}, "hnsw_config": hnsw, "optimizer_config": optimizer, "metadata": metadata}
    return {"status": "green", "optimizer_status": "ok", "segments_count": 1, "config": config, "payload_schema": {}}


@pytest.fixture
def server(qdrant):
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    listening.asked, listening.state, listening.info = [], {}, collection_info
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_a_server_gets_one_request_with_nested_prefetches(server):
    options = {"shard_number": 3, "replication_factor": 2, "on_disk_payload": True, "on_disk": True}
    engine = open_engine("qdrant", "pages", f"http://127.0.0.1:{server.server_port}", KEY, options)
    prefixes = ((8, "int8"), (16, "float16"))
    engine.create(Layout(32, prefixes, ((4, "HNSW24"),), {"name": "m"}))
    vectors = np.eye(4, 32, dtype=np.float32) + 0.1
    assert engine.add([(["a", "b", "c", "d"], vectors)], iter("wxyz")) == 4
    (created,) = [body for verb, path, _, body in server.asked if (verb, path) == ("PUT", "/collections/pages")]
    assert {name: created[name] for name in list(options)[:3]} == dict(list(options.items())[:3])
    stored = created["vectors"]
    assert {name: vector["size"] for name, vector in stored.items()} == {
        "8-int8": 8,
        "16-float16": 16,
        "4": 4,
        "32": 32,
    }
    assert {name: vector["hnsw_config"]["m"] for name, vector in stored.items() if vector["hnsw_config"]["m"]} == {
        "4": 24
    }
    assert all(vector["on_disk"] and vector["distance"] == "Cosine" for vector in stored.values())
    assert stored["8-int8"]["quantization_config"]["scalar"]["type"] == "int8"
    assert stored["16-float16"]["datatype"] == "float16"
    server.asked.clear()
    engine.search(vectors[:1], 2, [(8, 4, "int8"), (16, 3, "float16"), (32, 2)])
    engine.search(vectors[:1], 2, [(4, 3, "approximate"), (32, 2)])
    engine.search(vectors[:1], 2)
    paths, bodies = [asked[1] for asked in server.asked], [asked[3]["searches"][0] for asked in server.asked]
    assert paths == ["/collections/pages/points/query/batch"] * 3
    funnel, graph, exact = bodies
    assert [(s["using"], s["limit"]) for s in (funnel, funnel["prefetch"], funnel["prefetch"]["prefetch"])] == [
        *(("32", 2), ("16-float16", 3), ("8-int8", 4))
    ]
    assert funnel["prefetch"]["prefetch"]["params"] == {"quantization": {"rescore": False}}
    assert graph["prefetch"]["params"] == {"hnsw_ef": 6}
    assert exact["params"] == {"exact": True}
    engine.close()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_the_key_is_only_in_the_header(server, encoded, tmp_path, capsys, monkeypatch):
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTER", KEY)
    flags = ["--embeddings", str(encoded / "embeddings"), "--engine", "qdrant", "--engine_url", url]
    flags += ["--collection", "pages", "--engine_api_key_env", "CLUSTER"]
    build_index.main(flags)
    assert {key for _, _, key, _ in server.asked} == {KEY}
    printed = capsys.readouterr()
    assert KEY not in json.dumps([[path, body] for _, path, _, body in server.asked]) + "".join(printed)
    assert f"--engine_url {url} --engine_api_key_env CLUSTER" in printed.out  # the line that searches
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CLUSTER", "a wrong key")
    error = fails(build_index.main, flags, f"engine_api_key_env: {url} refuses the key", capsys)
    assert "a wrong key" not in error
