"""Tables whose pairs or texts are not what they seem: rejected pairs, ids, lists in texts, archives, no heading."""

import shlex

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from trainer.data import check_table
from trainer.shared.tables import check_texts, read_table
from trainer.shared.texts import read_corpus

TEXTS = {"query": ["a", "b", "c", "d"], "answer": ["e", "f", "g", "h"]}
NAMED = ["query:anchor", "answer:positive"]
WORDS = ["entailment", "neutral", "contradiction", "neutral"]


@pytest.mark.parametrize(
    ("name", "values", "columns", "shown"),
    [
        ("correct", [1, 0, 1, 1], None, "0"),
        ("class", [True, False, True, True], None, "False"),
        ("sign", [1, -1, 1, 1], None, "-1"),
        ("type", ["positive", "Negative", "positive", "positive"], None, "Negative"),
        ("duplicate", ["yes", "no", "yes", "no"], None, "no"),
        ("verdict", ["relevant", "not relevant", "relevant", "relevant"], NAMED, "not relevant"),
        ("label", [0, 1, 2, 1], NAMED, "0"),
        ("label", WORDS, NAMED, "contradiction"),
        ("gold_label", ["entailment", "neutral", "entailment", "-"], NAMED, "neutral"),
        ("inference", WORDS, NAMED, "contradiction"),
    ],
)
def test_rejected_pairs_are_no_positives(name, values, columns, shown):
    table = Dataset.from_dict(TEXTS | {name: values})
    message = f"the column {name} is {shown} in some rows, which would be trained as positives"
    with pytest.raises(ValueError, match=message):
        check_table(table, columns=columns)
    assert check_table(table.remove_columns(name), columns=columns).column_names == ["anchor", "positive"]


@pytest.mark.parametrize(
    ("name", "values", "columns", "named"),
    [
        ("flag", [1, 0, 1, 1], None, True),
        ("flag", [1, 0, 1, 1], ["query:anchor"], True),
        ("is_long", ["yes", "no", "yes", "no"], None, True),
        ("kind", ["duplicate", "irrelevant", "duplicate", "duplicate"], None, False),
        ("label", [1, 0, 1, 1], None, False),
        ("flag label", [1, 0, 1, 1], NAMED, False),
    ],
)
def test_every_way_out_that_is_named_works(name, values, columns, named):
    table = Dataset.from_dict({"query": TEXTS["query"], "Answer": TEXTS["answer"], name: values})
    if name == "label":  # else it is the score
        table = table.add_column("negative", TEXTS["answer"])
    columns = [entry.replace("answer", "Answer") for entry in columns or []]
    with pytest.raises(ValueError, match=f"the column {name} is ") as refused:
        check_table(table, columns=columns)
    _, offered, flags = str(refused.value).partition("for finetune.py: --columns ")
    assert bool(offered) == named
    if named:
        assert check_table(table, columns=shlex.split(flags)).num_rows == 4
    assert check_table(table.remove_columns(name), columns=columns).num_rows == 4
    kept = [number for number, value in enumerate(values) if value in (1, "yes", "duplicate")]
    assert check_table(table.select(kept), columns=columns).num_rows == len(kept)


def test_classes_are_looked_at_by_their_names():
    features = Features({name: Value("string") for name in TEXTS} | {"judge": ClassLabel(names=["good", "incorrect"])})
    with pytest.raises(ValueError, match="the column judge is incorrect in some rows"):
        check_table(Dataset.from_dict(TEXTS | {"judge": [0, 1, 0, 1]}, features), columns=NAMED)
    assert check_table(Dataset.from_dict(TEXTS | {"judge": [0] * 4}, features)).num_rows == 4


@pytest.mark.parametrize(
    ("cells", "columns"),
    [
        ({"language": ["en", "no", "en", "no"]}, NAMED),
        ({"language": ["en", "no", "en", "no"]}, None),
        ({"is_english": [0, 1, 1, 0]}, NAMED),
        ({"id": [0, 1, 2, 3], "source": ["a", "a", "b", "b"], "split": ["train"] * 4}, None),
        ({"grade": [3, 1, 2, 1], "label": [1, 1, 1, 1]}, NAMED),
    ],
)
def test_other_columns_are_left_out(cells, columns):
    assert check_table(Dataset.from_dict(TEXTS | cells), columns=columns).num_rows == 4


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["PLAIN-2", "MED_10"], "holds ids, such as 'PLAIN-2', not texts"),
        (['["a", "b"]', '["c"]'], "holds lists or objects written as text, such as"),
        (["['a\nb']", "['c']"], "holds lists or objects written as text, such as"),
        (["{'text': 'a'}", '{"text": "b"}'], "holds lists or objects written as text, such as"),
        ([{"docid": "1", "text": "a"}] * 2, "holds objects with the fields docid, text, not texts"),
        ([["a"], ["b"]], "column anchor holds lists, not texts"),
    ],
)
def test_texts_that_are_none(texts, message):
    with pytest.raises(ValueError, match=message):
        check_table(Dataset.from_dict({"query": texts, "answer": ["a", "b"]}))


def test_negatives_that_some_rows_do_not_have():
    pairs = {"anchor": ["a", "b", "c"], "positive": ["d", "e", "f"]}
    assert check_table(Dataset.from_dict(pairs | {"negative_1": [None] * 3})).num_rows == 3
    assert check_table(Dataset.from_dict(pairs | {"negative_1": [""] * 3})).num_rows == 3
    with pytest.raises(ValueError, match="column negative_1 holds lists or objects written as text, such as"):
        check_table(Dataset.from_dict(pairs | {"negative_1": ['["g"]', "", '["h", "i"]']}))


def test_codes_that_are_embedded_are_texts():
    check_texts(Dataset.from_dict({"text": ["PLAIN-2", "MED-10"]}), "text", "test_dataset", optional=False)


def test_texts_that_look_like_something_else():
    texts = ["[1] a reference", "B2B", "c", '["quoted"] or not']
    assert check_table(Dataset.from_dict(TEXTS | {"query": texts}))["anchor"][:] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"\x1f\x8b\x08 and so on", "t.csv is compressed by gzip: add .gz to its name"),
        ("t.jsonl", b"PK\x03\x04 and so on", "t.jsonl is a zip archive or an Excel workbook: unpack it, or save it"),
        ("t.csv", b"PAR1 and so on", "t.csv is parquet: name it .parquet"),
        ("t.csv.gz", b"anchor,positive\na,b\n", "t.csv.gz is not compressed by gzip; remove .gz from its name"),
        ("t.xlsx", b"PK\x03\x04 and so on", "unknown format; use one of .csv, .* save the sheet as CSV"),
        ("t.csv", b"\n\nanchor,positive\na,b\n", "the first line of .*t.csv is empty; write the names of the columns"),
        ("t.csv", b"# pairs\nanchor,positive\na,b\n", "line 2 of .* has more than the one column of the first line"),
    ],
)
def test_files_of_another_kind(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(str(tmp_path / name))


def test_archives_as_texts_without_labels(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="is a zip archive or an Excel workbook"):
        read_corpus(str(tmp_path / "t.txt"), "text")


def test_columns_without_names_are_left_out(tmp_path):
    """As spreadsheets write them."""
    (tmp_path / "t.csv").write_text("anchor,positive,,\na,b,,\nc,d,,\n")
    assert check_table(read_table(str(tmp_path / "t.csv"))).to_dict() == {"anchor": ["a", "c"], "positive": ["b", "d"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["what is an elastic encoder", "one of any size"],
            "the first line .what is an elastic .* seems to be a row",
        ),
        (
            ["1", "100", "200"],
            "the first line .1 .... seems to be a row; write the names of the columns above it",
        ),
        (["text1", "text2", "label", "similarity"], "label and similarity may be the score: choose one, for example"),
        (["query", "question", "answer"], "query and question may be the anchor: choose one, for example --columns qu"),
    ],
)
def test_what_is_not_clear_is_said(names, message):
    with pytest.raises(ValueError, match=message):
        check_table(Dataset.from_dict({name: ["a", "b"] for name in names}))
