"""Every format gives the same texts with their ids, and lines that cannot be read are named."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.reading import NO_IDS, Malformed, Text, check_format, count_lines, read_texts

TEXTS = ["a cat", "größer, heller", 'he said "no"']


def test_every_format_gives_the_same_texts(tmp_path, monkeypatch):
    lines = "\n".join(TEXTS) + "\n"
    rows = [{"text": text, "id": f"t{i}"} for i, text in enumerate(TEXTS)]
    quoted = ["text,id", *('"' + row["text"].replace('"', '""') + f'",{row["id"]}' for row in rows)]
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "a.csv").write_text("\n".join(quoted), encoding="utf-8")
    tabbed = [f"{row['text']}\t{row['id']}" for row in rows]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tid", *tabbed]).replace('"', '""'), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.txt", "b.txt", "a.txt.gz"):
        assert list(read_texts(str(tmp_path / name))) == [Text(str(i), text) for i, text in enumerate(TEXTS)]
        assert count_lines(str(tmp_path / name)) == 3
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        assert list(read_texts(str(tmp_path / name))) == [Text(row["id"], row["text"]) for row in rows]
        assert next(iter(read_texts(str(tmp_path / name), "id", "text"))) == Text("a cat", "t0")
        assert count_lines(str(tmp_path / name)) == 3
    assert [text.id for text in read_texts(str(tmp_path / "a.tsv"))] == ["t0", "t1", "t2"]
    assert count_lines(str(tmp_path / "a.parquet")) == 3
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert [text.text for text in read_texts("-")] == TEXTS
    assert count_lines("-") is None


def test_a_beir_corpus_joins_title_and_text(tmp_path):
    rows = [{"_id": "d1", "title": "Cats", "text": "They sleep."}, {"_id": "d2", "title": "", "text": "Dogs."}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_texts(str(tmp_path))) == [Text("d1", "Cats They sleep.", "Cats"), Text("d2", "Dogs.")]


def test_titles_as_texts_are_not_joined_with_themselves(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "Cats", "text": "They sleep."}')
    assert list(read_texts(str(tmp_path), "title")) == [Text("d1", "Cats")]


def test_numbers_are_titles_and_missing_ones_are_none(tmp_path):
    titles = [12, 0, "12", None]
    rows = [{"title": title, "text": f"text {i}"} for i, title in enumerate(titles)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"title": ["a"], "text": "text 4"}])))
    (tmp_path / "corpus.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    found = list(read_texts(str(tmp_path / "a.jsonl"), "text", NO_IDS))
    assert [text.title for text in found] == ["12", "0", "12", "", None]
    *joined, last = read_texts(str(tmp_path), "text", NO_IDS)
    assert [text.text for text in joined] == ["12 text 0", "0 text 1", "12 text 2", "text 3"]
    assert last == Malformed(5, "its title is no text")
    for numbers, shown in (([7, 0], ["7", "0"]), ([1.5, float("nan")], ["1.5", ""]), ([None, None], ["", ""])):
        pq.write_table(pa.table({"text": TEXTS[:2], "title": numbers}), tmp_path / "a.parquet")
        assert [text.title for text in read_texts(str(tmp_path / "a.parquet"))] == shown


def test_without_ids_their_columns_do_not_matter(tmp_path):
    rows = [{"_id": {"$oid": "5f"}, "id": None, "text": "a cat"}, {"_id": None, "text": "a dog"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("id,text,id\n,a cat,\n,a dog,\n")
    pq.write_table(pa.Table.from_pylist([{"id": [1], "text": "a cat"}, {"id": None, "text": "a dog"}]),
                   tmp_path / "a.parquet")  # fmt: skip
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert list(read_texts(str(tmp_path / name), "text", NO_IDS)) == [Text("0", "a cat"), Text("1", "a dog")]


def test_malformed_lines_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\nth\xff\nfour\n")
    lines = ['{"text": "a"}', "{", "[1]", '{"txt": "b"}', '{"text": 3}', '{"text": " "}', '{"_id": "", "text": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines"\n2\n3,a,b\n4,fine\n')
    found = list(read_texts(str(tmp_path / "a.txt")))
    assert found == [Text("0", "one"), Text("1", ""), Malformed(3, "byte 3 is not UTF-8"),
                     Text("3", "four")]  # fmt: skip
    first, *others = read_texts(str(tmp_path / "a.jsonl"))
    assert first == Text("0", "a")
    assert others.pop(4) == Text("5", " ")
    assert [item.line for item in others] == [2, 3, 4, 5, 7]
    reasons = ("it is not JSON", "not a JSON object", "it has no text", "its text is a int", "has no _id")
    assert all(reason in item.reason for reason, item in zip(reasons, others, strict=True))
    found = list(read_texts(str(tmp_path / "a.csv")))
    assert found == [Text("1", "two\nlines"), Malformed(4, "it does not have 2 columns"),
                     Malformed(5, "it does not have 2 columns"), Text("4", "fine")]  # fmt: skip


def test_quotation_marks_that_join_lines_of_a_tsv_are_named(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"No\n2\tYes"\n3\tfine\n4\t"two\nlines"\n')
    first, *others = read_texts(str(tmp_path / "a.tsv"))
    assert isinstance(first, Malformed)
    assert first.line == 3
    assert "joins it with an earlier line" in first.reason
    assert others == [Text("3", "fine"), Text("4", "two\nlines")]
    (tmp_path / "a.csv").write_text('id,text\n1,"two\n\tlines"\n')  # a tab is nothing special there
    assert list(read_texts(str(tmp_path / "a.csv"))) == [Text("1", "two\n\tlines")]


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,txt\n1,a\n")
    (tmp_path / "a.doc").write_text("a")
    (tmp_path / "a.parquet").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress("\n".join(map(str, range(9999))).encode())[:-900])
    (tmp_path / "a.parquet.gz").write_text("a")
    for name, message in (
        ("a.parquet.gz", "unknown format; use one of"),
        ("a.csv", "there is no column text among id, txt"),
        ("a.doc", r"unknown format; use one of \.txt, \.csv"),
        ("a.parquet", "cannot be read as parquet"),
        ("empty", r"is a folder without a corpus\.jsonl"),
        ("none.txt", "is not a file"),
        ("cut.txt.gz", "the compressed file ends after line"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_texts(str(tmp_path / name)))


@pytest.mark.parametrize(("path", "where"), [("-", "standard input"), ("a.TXT.gz", r"a\.TXT\.gz")])
def test_lines_of_text_have_no_columns(path, where):
    check_format(path)
    check_format("a.csv", "body")
    with pytest.raises(ValueError, match=f"text_column: body is not allowed; {where} has a text per line and no col"):
        check_format(path, "body")
