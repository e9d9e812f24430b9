"""An index in PostgreSQL with pgvector: one table, a column per prefix, and the funnel as one SQL statement."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .engines import Block, Layout, Server
from .stages import APPROXIMATE, Stage
from .vectors import unit_queries

# PostgreSQL cuts names after 63 bytes; those of the graphs are the table's with a suffix.
_LONGEST_NAME = 48
_ROWS = 4096
# What pgvector can build a graph on, and the most candidates that a graph's search may have.
_MOST_DIMS = {"float32": 2000, "float16": 4000, "binary": 64000}
_MOST_CANDIDATES = 1000
_TYPES = {"float32": "vector", "float16": "halfvec", "binary": "bit"}
_OPERATORS = {"float32": "<=>", "float16": "<=>", "binary": "<~>"}
_CLASSES = {"float32": "vector_cosine_ops", "float16": "halfvec_cosine_ops", "binary": "bit_hamming_ops"}
VECTORS = "embedding"


def _driver() -> tuple[Any, Any]:
    """psycopg and its module of SQL; ValueError if one of the libraries is not installed."""
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
        from psycopg import sql
    except ImportError as error:
        raise ValueError('engine: psycopg or pgvector is missing; pip install "twodmse[pgvector]"') from error
    return psycopg, sql


class PgVector(Server):
    """A table (id, text, embedding, a generated column per prefix) whose comment is the index's description.

    Args:
        table: its name, in the first schema of the search path.
        url: connection URL or string of libpq.

    Raises:
        ValueError: the server cannot be reached, it has no pgvector, or the name is too long.
    """

    precisions = tuple(_TYPES)
    most_neighbours = 100

    def __init__(self, table: str, url: str):
        if not 1 <= len(table.encode()) <= _LONGEST_NAME or "\0" in table:
            raise ValueError(f"collection: {table[:80]!r} is not allowed; use a name of 1 to {_LONGEST_NAME} bytes")
        self.place = f"table {table}"
        self._name = table
        self._psycopg, self._sql = _driver()
        self._table = self._sql.Identifier(table)
        # In a statement with parameters, psycopg takes a single % for one of them.
        self._source = self._sql.Identifier(table.replace("%", "%%"))
        self._connection = self._connect(url)

    def _connect(self, url: str) -> Any:
        from pgvector.psycopg import register_vector

        psycopg = self._psycopg
        try:
            psycopg.conninfo.conninfo_to_dict(url)
        except (psycopg.Error, UnicodeError):  # the message has parts of the URL, and so perhaps of a password
            raise ValueError("engine_url_env: its value is not a URL such as postgresql://host/database") from None
        try:
            connection = psycopg.connect(url, autocommit=True, connect_timeout=10, client_encoding="utf8")
        except psycopg.Error as error:
            # What it quotes comes from the URL, and may be the end of a password with an @.
            reason = re.sub(r"""(["']).*?\1""", '"..."', _line(error))
            raise ValueError(f"engine_url_env: PostgreSQL cannot be reached: {reason}") from None
        try:
            if connection.execute("SELECT to_regtype('vector')").fetchone() == (None,):
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            register_vector(connection)
        except psycopg.Error as error:
            connection.close()
            raise ValueError(f"engine_url_env: the database has no pgvector: {_line(error)}") from error
        return connection

    def check_layout(self, layout: Layout) -> None:
        super().check_layout(layout)
        for dim, precision in layout.neighbours():
            if dim > _MOST_DIMS[precision]:
                raise ValueError(
                    f"approximate: {dim} is not allowed; pgvector builds a graph on 1 to {_MOST_DIMS[precision]} "
                    f"dimensions in {precision}"
                )

    def create(self, layout: Layout, overwrite: bool = False) -> None:
        if self.begin(layout, overwrite):
            return
        with self._errors(), self._connection.transaction():
            self._connection.execute(self._definition())
            self._describe()

    def _definition(self) -> Any:
        """The table: PostgreSQL itself cuts the prefixes, also those of rows that others insert."""
        sql = self._sql
        columns = [
            sql.SQL('id text COLLATE "C" PRIMARY KEY'),
            sql.SQL("text text"),
            sql.SQL("{} vector({}) NOT NULL").format(sql.Identifier(VECTORS), self.layout.width),
        ]
        for dim, precision in self._generated():
            value = sql.SQL("subvector({}, 1, {})").format(sql.Identifier(VECTORS), dim)
            if precision == "binary":
                value = sql.SQL("binary_quantize({})").format(value)
            names = {"name": self._column(dim, precision), "type": sql.SQL(_TYPES[precision]), "dim": dim}
            text = "{name} {type}({dim}) GENERATED ALWAYS AS (({value})::{type}({dim})) STORED"
            columns.append(sql.SQL(text).format(**names, value=value))
        return sql.SQL("CREATE TABLE {} ({})").format(self._table, sql.SQL(", ").join(columns))

    def _generated(self) -> list[tuple[int, str]]:
        return [entry for entry in self.layout.stored() if entry != (self.layout.width, "float32")]

    def _column(self, dim: int, precision: str) -> Any:
        whole = (dim, precision) == (self.layout.width, "float32")
        return self._sql.Identifier(VECTORS if whole else f"{VECTORS}_{dim}_{precision}")

    def add(
        self,
        blocks: Iterable[Block],
        texts: Iterable[str] | None = None,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> int:
        new = 0
        for ids, rows, own in self.parts(blocks, texts, _ROWS):
            with self._errors():
                new += self._insert(ids, rows, own)
            progress(len(ids))
        with self._errors():
            self._build_graphs()
            self.size = self.count()
            self._describe()
        return new

    def _insert(self, ids: list[str], rows: np.ndarray, texts: list[str] | None) -> int:
        """Copy rows into a temporary table, and from it what is new or has changed; all of it or nothing."""
        sql, connection = self._sql, self._connection
        named = {"table": self._table, "vectors": sql.Identifier(VECTORS), "width": self.layout.width}
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(
                sql.SQL(
                    "CREATE TEMPORARY TABLE new_rows (id text, text text, {vectors} vector({width})) ON COMMIT DROP"
                ).format(**named)
            )
            with cursor.copy("COPY new_rows FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["text", "text", "vector"])
                for place, name in enumerate(ids):
                    text = None if texts is None else texts[place]
                    if "\0" in f"{name}{text}":
                        raise ValueError(f"texts: {name!r} or its text has a NUL character, which PostgreSQL refuses")
                    copy.write_row((name, text, rows[place]))
            cursor.execute(
                sql.SQL(
                    "INSERT INTO {table} AS old (id, text, {vectors}) SELECT id, text, {vectors} FROM new_rows "
                    "ON CONFLICT (id) DO UPDATE SET text = excluded.text, {vectors} = excluded.{vectors} "
                    "WHERE (old.text, old.{vectors}) IS DISTINCT FROM (excluded.text, excluded.{vectors})"
                ).format(**named)
            )
            return cursor.rowcount

    def _build_graphs(self) -> None:
        """After the rows, which is several times faster than before them."""
        sql = self._sql
        for (dim, precision), neighbours in self.layout.neighbours().items():
            names = {
                "index": sql.Identifier(f"{self._name}_{dim}_hnsw"),
                "table": self._table,
                "column": self._column(dim, precision),
                "operators": sql.SQL(_CLASSES[precision]),
                # pgvector wants at least twice as many candidates as neighbours; 64 are its default
                "candidates": max(64, 2 * neighbours),
            }
            text = (
                "CREATE INDEX IF NOT EXISTS {index} ON {table} USING hnsw ({column} {operators}) "
                "WITH (m = {neighbours}, ef_construction = {candidates})"
            )
            self._connection.execute(sql.SQL(text).format(**names, neighbours=neighbours))

    def search(
        self, queries: np.ndarray, k: int = 10, stages: Sequence[Stage | tuple] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, checked = unit_queries(queries, self.layout.width), self.check_stages(stages, k)
        statement, settings = self._statement(checked), self._settings(checked[0])
        start, found = time.perf_counter(), []
        with self._errors(), self._connection.transaction():
            self._connection.execute(settings)
            for row in rows:
                values = {f"query{place}": self._value(row, stage) for place, stage in enumerate(checked)}
                found.append(self._connection.execute(statement, values).fetchall())
        self.seconds = [time.perf_counter() - start]
        return self.results(found, k)

    def _statement(self, stages: Sequence[Stage]) -> Any:
        """One SELECT for all stages, each around the one before it."""
        sql = self._sql
        source = self._source
        for place, stage in enumerate(stages):
            dim, precision = self.layout.find(stage)
            names = {
                "column": self._column(dim, precision),
                "operator": sql.SQL(_OPERATORS[precision]),
                "query": sql.Placeholder(f"query{place}"),
                "source": source,
                "keep": stage.keep,
                "stage": sql.Identifier(f"stage{place}"),
            }
            distance = order = sql.SQL("{column} {operator} {query}").format(**names)
            # A graph orders by the distance only.
            if stage.precision != APPROXIMATE:
                # The cosine of a prefix of zeros is NaN, and 0 in the other engines.
                distance = sql.SQL("coalesce(nullif({}, 'NaN'), 1)").format(distance)
                order = sql.SQL("{}, id").format(distance)
            chosen = sql.SQL("*")
            if place == len(stages) - 1:
                chosen = sql.SQL("1 - ({distance}) / {unit} AS score, id").format(
                    distance=distance, unit=sql.SQL("{}::float8").format(dim if precision == "binary" else 1)
                )
            text = "SELECT {chosen} FROM {source} AS {stage} ORDER BY {order} LIMIT {keep}"
            source = sql.SQL("({})").format(sql.SQL(text).format(chosen=chosen, order=order, **names))
        return sql.SQL("SELECT score, id FROM {} AS found ORDER BY score DESC, id").format(source)

    def _settings(self, first: Stage) -> Any:
        """A graph is used if, and only if, the stage asks for it. Both settings end with the transaction."""
        if first.precision != APPROXIMATE:
            return "SET LOCAL enable_indexscan = off"
        text = (
            "SET LOCAL enable_seqscan = off; SET LOCAL hnsw.iterative_scan = relaxed_order; SET LOCAL hnsw.ef_search = "
        )
        return self._sql.SQL(text + "{}").format(min(_MOST_CANDIDATES, max(40, 2 * first.keep)))

    def _value(self, row: np.ndarray, stage: Stage) -> Any:
        from pgvector import Bit, HalfVector, Vector

        dim, precision = self.layout.find(stage)
        kinds = {"float32": Vector, "float16": HalfVector}
        return Bit(row[:dim] > 0) if precision == "binary" else kinds[precision](row[:dim])

    def texts(self, ids: Sequence[str]) -> list[str]:
        statement = self._sql.SQL("SELECT id, text FROM {} WHERE id = ANY(%s)").format(self._source)
        with self._errors():
            found = dict(self._connection.execute(statement, [list(ids)]).fetchall())
        return [found.get(name) or "" for name in ids]

    def count(self) -> int:
        with self._errors():
            return self._connection.execute(self._sql.SQL("SELECT count(*) FROM {}").format(self._table)).fetchone()[0]

    def drop(self) -> None:
        if self._read() is not None:
            with self._errors():
                self._connection.execute(self._sql.SQL("DROP TABLE {}").format(self._table))
        self.size = None

    def close(self) -> None:
        self._connection.close()

    def _describe(self) -> None:
        """Write the description into the table's comment, which copies of the database keep."""
        sql = self._sql
        text = json.dumps({"index": self.layout.describe(), "count": self.size})
        self._connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(self._table, sql.Literal(text)))

    def _read(self) -> tuple[Layout, int | None] | None:
        """The layout and size in the table's comment; None without a table, ValueError if the table is another one."""
        quoted = self._table.as_string(self._connection)
        statement = "SELECT obj_description(to_regclass(%s), 'pg_class'), to_regclass(%s) IS NULL"
        with self._errors():
            text, is_missing = self._connection.execute(statement, [quoted, quoted]).fetchone()
        if is_missing:
            return None
        try:
            content = json.loads(text or "null")
            layout, size = Layout.read(content["index"], "comment"), content["count"]
            self.check_layout(layout)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"collection: {self.place} exists and is not an index of build_index.py") from error
        return layout, size if type(size) is int else None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the server refuses, as a ValueError of one line."""
        try:
            yield
        except self._psycopg.Error as error:
            raise ValueError(f"engine: {self.place}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
