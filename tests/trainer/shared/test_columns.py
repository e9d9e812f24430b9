"""Tables as people have them: names of columns, hints in errors, saved folders, rows that are not valid."""

import gzip

import pytest
from conftest import SENTENCES
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value

from trainer.data import check_table
from trainer.shared.tables import hold_out, read_splits, read_table
from trainer.shared.texts import read_corpus

PAIR, SCORED = ["anchor", "positive"], ["sentence1", "sentence2", "score"]
NAMED = [
    (["query", "document"], PAIR),
    (["question", "answer"], PAIR),
    (["Query", "POSITIVE"], PAIR),
    (["text1", "text2"], PAIR),
    (["text_a", "text_b", "label"], SCORED),
    (["sentence1", "sentence2", "label"], SCORED),
    (["Sentence1", "Sentence2", "Similarity"], SCORED),
    (["query", "pos", "neg"], [*PAIR, "negative"]),
    (["queries", "positives", "negatives"], [*PAIR, "negative"]),
    (["question", "Positive_Passages", "hard_negative_passages"], [*PAIR, "negative"]),
    (["questions", "answers"], PAIR),
    (["id", "question1", "question2", "is_duplicate"], SCORED),
    (["sent1", "sent2", "label"], SCORED),
    (["question", "passage", "hard_negative", "neg_2"], [*PAIR, "negative", "negative_2"]),
    (["id", "anchor", "positive", "source"], PAIR),
    (["anchor", "positive", "question", "answer"], PAIR),
]


@pytest.mark.parametrize(("names", "roles"), NAMED)
def test_known_names_are_taken_and_others_left_out(names, roles):
    cells = {name: [f"{name} a", f"{name} b"] for name in names}
    cells |= {name: [0.5, 1.0] for name in names if name.lower() in ("label", "similarity", "is_duplicate")}
    table = check_table(Dataset.from_dict(cells).select_columns(names[::-1]))
    assert table.column_names == roles
    kept = [name for name in names if name not in ("id", "source")][: len(roles)]
    assert table.to_dict() == {role: cells[name] for role, name in zip(roles, kept, strict=True)}


def test_what_was_done_is_said(caplog, monkeypatch):
    said = []
    monkeypatch.setattr("trainer.shared.columns.logger.warning", said.append)
    check_table(Dataset.from_dict({"id": [1], "query": ["a"], "document": ["b"]}))
    assert said == [
        "train_file: query is read as anchor, document is read as positive",
        "train_file: the column id is left out",
    ]
    said.clear()
    check_table(Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}))
    assert said == []


def test_roles_by_hand():
    table = Dataset.from_dict({"title": ["a"], "body": ["b"], "answer": ["c"], "other": ["d"]})
    given = check_table(table, columns=["title:anchor", "body:positive", "other:negative"])
    assert given.to_dict() == {"anchor": ["a"], "positive": ["b"], "negative": ["d"]}
    assert check_table(table, columns=["title:anchor"]).to_dict() == {"anchor": ["a"], "positive": ["c"]}
    swapped = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})
    assert check_table(swapped, columns=["anchor:positive", "positive:anchor"]).to_dict() == {
        "anchor": ["b"], "positive": ["a"],
    }  # fmt: skip
    scored = Dataset.from_dict({"left": ["a"], "right": ["b"], "gold": [0.5], "answer": ["c"]})
    by_hand = check_table(scored, columns=["left:sentence1", "right:sentence2", "gold:score"])
    assert by_hand.to_dict() == {"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]}


@pytest.mark.parametrize(
    ("cells", "columns", "message"),
    [
        ({"title": ["a"], "body": ["b"]}, None, r"the columns \\(title, body\\) .* for example --columns query:anchor"),
        ({"query": ["a"], "question": ["b"], "answer": ["c"]}, None, "are not one of the accepted sets"),
        ({"query": ["a"], "answer": ["b"]}, ["query:first"], "columns: 'query:first' is not NAME:ROLE"),
        ({"query": ["a"], "answer": ["b"]}, ["title:anchor"], "train_file has no column title, only query, answer"),
        ({"query": ["a"], "answer": ["b"]}, ["query:anchor", "answer:anchor"], "two columns are given as anchor"),
        ({"query": ["a"], "pos": [["b"]], "score": [0.5]}, None, "column sentence2 holds lists, not texts"),
        ({"text1": ["a"] * 3, "text2": ["b"] * 3, "label": [0, 1, 2]}, None, "label has three classes"),
    ],
)
def test_columns_that_are_not_clear(cells, columns, message):
    with pytest.raises(ValueError, match=message.replace("\\\\", "\\")):
        check_table(Dataset.from_dict(cells), columns=columns)


@pytest.mark.parametrize("kind", [List, LargeList])
def test_lists_of_positives_and_negatives(kind):
    rows = {"query": ["a", "b"], "pos": [["c", "d"], ["e"]], "neg": [["f"], ["g", "h"]]}
    features = Features({"query": Value("string"), "pos": kind(Value("string")), "neg": kind(Value("string"))})
    assert check_table(Dataset.from_dict(rows, features)).to_dict() == {
        "anchor": ["a", "a", "b"],
        "positive": ["c", "d", "e"],
        "negative_1": ["f", "f", "g"],
        "negative_2": [None, None, "h"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"anchor\tpositive\na\tb\n", "seem to be separated by tabs: name it .tsv"),
        (b"\xfe\xff" + "anchor,positive\na,b\n".encode("utf-16-be"), "perhaps UTF-16: convert it"),
        (b"anchor;positive\na;b, c, d\n", "seem to be separated by semicolons"),
        (b"anchor|positive\na|b\n", "seem to be separated by vertical bars"),
        ("anchor,positive\na,b\n".encode("utf-16"), "perhaps UTF-16: convert it with iconv -f utf-16 -t utf-8"),
        (
            "anchor,positive\ncaf\u00e9,b\n".encode("latin-1"),
            "perhaps Latin-1: convert it with iconv -f latin1 -t utf-8",
        ),
        ("anchor,positif\u00e9\na,b\n".encode("latin-1"), "perhaps Latin-1: convert it"),
        ("anchor,positive\na,b\n".encode("utf-16-le"), "perhaps UTF-16LE: convert it with iconv -f utf-16le -t utf-8"),
        ("anchor,positive\na,b\n".encode("utf-16-be"), "perhaps UTF-16BE: convert it with iconv -f utf-16be"),
        (
            "anchor,positive\na,\u201cb\u201d\n".encode("cp1252"),
            "perhaps Windows-1252: convert it with iconv -f windows",
        ),
        ("anchor,positive\ncaf\u00e9,b \u2013 c\n".encode("cp1252"), "perhaps Windows-1252: convert it"),
        (b"anchor,positive\n" + b"a,b\n" * 300_000 + b"a,\x93b\n", "perhaps Windows-1252: convert it"),
    ],
)
def test_hints(content, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content, compresslevel=1))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=message):
            read_table(str(path))


def test_the_encoding_of_other_files(tmp_path):
    for name, content, message in (
        ("t.jsonl", '{"anchor": "a", "positive": "b"}\n'.encode("utf-16"), "perhaps UTF-16: convert it"),
        ("u.jsonl", '{"anchor": "a", "positive": "b"}\n'.encode("utf-16-le"), "perhaps UTF-16LE: convert it"),
        ("v.jsonl", '{"anchor": "\u201ca", "positive": "b"}\n'.encode("cp1252"), "perhaps Windows-1252: convert it"),
        ("w.txt", "it\u2019s a text\n".encode("cp1252"), "perhaps Windows-1252: convert it"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_corpus(str(tmp_path / name), "text") if name.endswith(".txt") else read_table(str(tmp_path / name))
    (tmp_path / "x.parquet").write_bytes(b"\xff\xfe nothing")
    with pytest.raises(ValueError, match="cannot be read as parquet") as refused:
        read_table(str(tmp_path / "x.parquet"))
    assert "UTF" not in str(refused.value)


def test_a_hint_for_lines_that_are_lists(tmp_path):
    (tmp_path / "t.jsonl").write_text('["a", "b"]\n["c", "d"]\n')
    with pytest.raises(ValueError, match=r'its lines seem to be lists: write objects, for example \{"anchor"'):
        read_table(str(tmp_path / "t.jsonl"))


def test_a_list_of_negatives_beside_numbered_ones():
    rows = {"query": ["a", "b"], "pos": ["c", "d"], "neg": [["e", "f"], ["g"]], "negative_1": ["h", "i"]}
    assert check_table(Dataset.from_dict(rows)).to_dict() == {
        "anchor": ["a", "b"],
        "positive": ["c", "d"],
        "negative_1": ["h", "i"],
        "negative_2": ["e", "g"],
        "negative_3": ["f", None],
    }


@pytest.mark.parametrize(
    "name", ["relevance", "relevant", "is_relevant", "Rel", "qrel", "grade", "label", "similarity"]
)
def test_pairs_that_are_not_relevant_are_no_positives(name):
    texts = {"query": ["a", "b", "c"], "passage": ["d", "e", "f"]}
    for values in ([1, 0, 1], [True, False, True], ["1", "0", "1"], [2.0, 0.0, None], [3, 0, 2]):
        table = Dataset.from_dict(texts | {name: values})
        if None in values:
            with pytest.raises(ValueError, match="column score holds a value that is not a finite number in row 3"):
                check_table(table)
        else:
            assert check_table(table)["score"][:] == [float(value) for value in values]
    for roles, column in ((["query:anchor", "passage:positive"], {}), (None, {"negative": ["x", "y", "z"]})):
        table = Dataset.from_dict(texts | {name: [1, 0, 1]} | column)
        with pytest.raises(
            ValueError, match=f"the column {name} is 0 in some rows, which would be trained as positives"
        ):
            check_table(table, columns=roles)
        assert check_table(table.remove_columns(name), columns=roles).column_names == PAIR + list(column)


def test_judgements_without_a_zero():
    texts = {"query": ["a", "b", "c"], "passage": ["d", "e", "f"]}
    for values in ([1, 1, 1], [2, 1, 3], ["A", "B", "C"]):
        assert check_table(Dataset.from_dict(texts | {"grade": values})).column_names == PAIR
    assert check_table(Dataset.from_dict(texts | {"relevance": [0, 1, 2]})).column_names == SCORED
    with pytest.raises(ValueError, match=r"^train_file: the column rel is 0 in every row, so no row is a positive$"):
        check_table(Dataset.from_dict(texts | {"rel": [0, 0, 0]}))
    with pytest.raises(ValueError, match="column score must hold numbers, but has texts, for example 'yes' in row 1"):
        check_table(Dataset.from_dict(texts | {"relevant": ["yes", "no", "yes"]}))


@pytest.mark.parametrize("names", [["Sentence1", "Sentence2"], ["sentence_A", "sentence_B"]])
def test_sentences_need_a_score_under_any_name(names):
    texts = {name: ["a", "b"] for name in names}
    with pytest.raises(ValueError, match="are not one of the accepted sets"):
        check_table(Dataset.from_dict(texts))
    assert check_table(Dataset.from_dict(texts | {"relatedness_score": [1.0, 2.0]})).column_names == SCORED


@pytest.mark.parametrize(("mark", "hint"), [(",", "by commas: name it .csv"), (";", "by semicolons")])
def test_hints_for_a_tsv(mark, hint, tmp_path):
    (tmp_path / "t.tsv").write_text(f"anchor{mark}positive\na{mark}b\n")
    with pytest.raises(ValueError, match=f"t.tsv has only one column; its columns seem to be separated {hint}"):
        read_table(str(tmp_path / "t.tsv"))


def test_saved_folders(tmp_path):
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    DatasetDict({"all": rows}).save_to_disk(tmp_path / "only")
    assert read_table(str(tmp_path / "one")).to_dict() == rows.to_dict()
    assert read_table(str(tmp_path / "only")).to_dict() == rows.to_dict()
    assert read_table(str(tmp_path / "two")).to_dict() == rows.to_dict()
    assert read_table(str(tmp_path / "two"), split="test")["anchor"][:] == ["b"]
    assert read_table(str(tmp_path / "two"), split="train+test")["anchor"][:] == ["a", "b", "b"]
    with pytest.raises(ValueError, match="has no split dev; it has train, test"):
        read_table(str(tmp_path / "two"), split="dev")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"plain is a folder, but none of datasets.save_to_disk; name a file"):
        read_table(str(tmp_path / "plain"))


def test_splits_with_different_columns_are_tables_of_their_own(tmp_path):
    pairs = {"query": ["a", "b"], "document": ["c", "d"]}
    more = {"question": ["e"], "answer": ["f"], "negative": ["g"]}
    folder = str(tmp_path / "splits")
    DatasetDict({"train": Dataset.from_dict(pairs), "more": Dataset.from_dict(more)}).save_to_disk(folder)
    tables = [check_table(table) for table in read_splits(folder, "train_file", "train+more")]
    assert [table["anchor"][:] for table in tables] == [["a", "b"], ["e"]]
    assert tables[1]["negative"][:] == ["g"]
    with pytest.raises(ValueError, match=r"eval_file: the splits train\+more of .* have different columns; name one"):
        read_table(folder, "eval_file", "train+more")


def test_rows_that_are_not_valid_can_be_left_out():
    pairs = Dataset.from_dict({"anchor": ["a", " ", "c"], "positive": ["d", "e", None], "negative_1": ["", "x", "y"]})
    assert check_table(pairs, skip_invalid=True)["anchor"][:] == ["a"]
    with pytest.raises(ValueError, match="remove these rows, or pass --skip_invalid true"):
        check_table(pairs)
    scored = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "score": ["1", "", "nan"]}
    assert check_table(Dataset.from_dict(scored), skip_invalid=True)["score"][:] == [1.0]
    with pytest.raises(ValueError, match="none of the 1 rows is valid"):
        check_table(pairs.select([1]), skip_invalid=True)


def test_rows_with_one_anchor():
    equal = Dataset.from_dict({"anchor": ["same"] * 300, "positive": [f"{i}" for i in range(300)]})
    with pytest.raises(ValueError, match="all 300 rows have the same anchor, so none can be held out"):
        hold_out(equal, 30, 0)
    most = Dataset.from_dict({"anchor": ["same"] * 300 + SENTENCES, "positive": [f"{i}" for i in range(320)]})
    for seed in range(30):
        kept, held = hold_out(most, 30, seed)
        assert len(kept) >= 300, "the anchor of most rows is not held out"
        assert len(held)
