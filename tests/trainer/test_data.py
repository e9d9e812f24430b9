"""Tables: every format, every problem, splitting, collating."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset

from trainer.data import PairCollator, add_unlabeled_texts, check_table, join_tables, text_columns, texts_to_fit
from trainer.shared.tables import hold_out, read_table

ROWS = {"anchor": ["one, two", "None"], "positive": ['a "quoted" text', "NA"]}


def write(path, text: str):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


@pytest.mark.parametrize(
    "name", ["t.csv", "t.csv.gz", "t.tsv", "t.tsv.gz", "t.jsonl", "t.jsonl.gz", "t.ndjson", "t.parquet"]
)
def test_formats(name, tmp_path):
    table = Dataset.from_dict(ROWS)
    plain = tmp_path / name.removesuffix(".gz")
    if ".parquet" in name:
        table.to_parquet(plain)
    elif "json" in name:
        table.to_json(plain)
    else:
        table.to_csv(plain, sep="\t" if ".tsv" in name else ",", index=False)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    read = check_table(read_table(str(tmp_path / name)))
    assert read.to_dict() == ROWS  # commas, quotes and words that pandas reads as missing values are kept


def test_texts_of_every_type_of_arrow(tmp_path):
    types = (pa.string(), pa.large_string(), pa.string_view())
    paths = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    for kind, path in zip(types, paths, strict=True):
        columns = {name: pa.array(texts, kind) for name, texts in ROWS.items()}
        if kind != pa.string():
            columns["negative"] = pa.array(["x", "y"], kind)
        pq.write_table(pa.table(columns), path)
    joined = join_tables([check_table(read_table(path)) for path in paths])
    assert joined["anchor"][:] == ROWS["anchor"] * 3
    assert joined["negative"][:] == [None, None, "x", "y", "x", "y"]


def test_a_line_of_json_that_is_not_utf8(tmp_path):
    (tmp_path / "t.jsonl").write_bytes('{"anchor": "café", "positive": "b"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^train_file: .* cannot be read as jsonl.* perhaps Latin-1: convert it with"):
        read_table(str(tmp_path / "t.jsonl"))


def test_parquet_gz(tmp_path):
    Dataset.from_dict(ROWS).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    assert read_table(str(tmp_path / "t.parquet.gz")).to_dict() == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "anchor,positive\n", "has no rows"),
        ("t.txt", "a", "unknown format; use one of .csv, .tsv"),
        ("t.csv", "anchor,negative\na,b\n", r"accepted sets: \(anchor, positive\[, negative"),
        ("t.tsv", 'anchor\tpositive\na\t"No\nb\tYes"\nc\td\n', "line 3 of .* is joined with an earlier one by a quot"),
        ("t.csv", "anchor,extra\na,b\n", "the columns .anchor, extra. are not one of"),
        ("t.csv", "sentence1,sentence2\na,b\n", "are not one of the accepted sets"),
        ("t.csv", "anchor,positive\na,\nb,c\n", "column positive holds an empty text in row 1"),
        ("t.csv", "anchor,positive\na,b\n  ,c\n", "column anchor holds an empty text in row 2"),
        (
            "t.csv",
            "sentence1,sentence2,score\na,b,high\n",
            "must hold numbers, but has texts, for example 'high' in row 1",
        ),
        (
            "t.csv",
            "sentence1,sentence2,score\na,b,1\na,b,n/a\na,b,\na,b,1_0\n",
            "score must hold numbers, but has others in 2 rows, first 'n/a' in row 2; remove these rows, or pass",
        ),
        ("t.csv", 'sentence1,sentence2,score\na,b,"1,5"\n', "has '1,5' in row 1: write a point instead of the comma"),
        (
            "t.csv",
            "sentence1,sentence2,score\na,b,1\nc,d,\n",
            "score holds a value that is not a finite number in row 2; remove these rows",
        ),
        ("t.csv", "sentence1,sentence2,score\na,b,1\nc,d,nan\n", "column score"),
        ("t.jsonl", '{"sentence1": "a", "sentence2": "b", "score": NaN}\n', "column score"),
        ("t.jsonl", '{"anchor": "a", "positive": null}\n', "column positive holds"),
        ("t.jsonl", '{"anchor": 3, "positive": "b"}\n', "column anchor holds int64, not texts"),
        ("t.jsonl", "not json\n", "cannot be read as jsonl"),
    ],
)
def test_problems(name, text, message, tmp_path):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as caught:
        check_table(read_table(path))
    assert str(caught.value).startswith("train_file:")


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"train_file: .*absent.csv is not a file"):
        read_table(str(tmp_path / "absent.csv"))


def test_columns_are_put_in_the_order_of_their_roles():
    table = Dataset.from_dict({"negative_2": ["d"], "positive": ["b"], "negative": ["c"], "anchor": ["a"]})
    assert check_table(table).column_names == ["anchor", "positive", "negative", "negative_2"]
    scored = Dataset.from_dict({"score": [1], "sentence2": ["b"], "sentence1": ["a"]})
    assert text_columns(check_table(scored)) == ["sentence1", "sentence2"]
    assert check_table(scored)["score"][:] == [1.0]


def test_hold_out_does_not_split_the_rows_of_an_anchor():
    anchors = [f"anchor {i % 10}" for i in range(40)]
    table = Dataset.from_dict({"anchor": anchors, "positive": [f"p {i}" for i in range(40)]})
    train, held = hold_out(table, 8, seed=3)
    assert len(train) + len(held) == 40
    assert len(held) == 8
    assert not set(train["anchor"]) & set(held["anchor"])
    assert hold_out(table, 8, seed=3)[1].to_dict() == held.to_dict()


def test_collator_lays_out_columns_one_after_another(tokenizer):
    collator = PairCollator(tokenizer, ["sentence1", "sentence2"], 6)
    examples = [{"sentence1": SENTENCES[i], "sentence2": SENTENCES[i + 2], "score": i} for i in (0, 1)]
    batch = collator(examples)
    texts = [SENTENCES[0], SENTENCES[1], SENTENCES[2], SENTENCES[3]]
    for row, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=6)["input_ids"]
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == expected
        assert batch["attention_mask"][row, :length].all()  # padding is on the right
    assert batch["counts"] == (2, 2)
    assert torch.equal(batch["scores"], torch.tensor([0.0, 1.0]))


def test_unlabeled_texts_join_the_rows_and_are_counted_separately(tokenizer):
    rows = Dataset.from_dict({"anchor": SENTENCES[:7], "positive": SENTENCES[7:14], "negative_1": ["x", *[None] * 6]})
    table = add_unlabeled_texts(rows, SENTENCES[14:17], seed=1, batch=3)
    assert table.remove_columns("unlabeled")[:] == rows[:]
    unlabeled = table["unlabeled"][:]
    assert set(unlabeled) == set(unlabeled[:3]) == set(SENTENCES[14:17]), "the order is repeated"
    assert unlabeled == add_unlabeled_texts(rows, SENTENCES[14:17], seed=1, batch=3)["unlabeled"][:]
    orders = {tuple(add_unlabeled_texts(rows, SENTENCES, seed=seed, batch=3)["unlabeled"]) for seed in range(3)}
    assert len(orders) == 3, "each seed gives another order"
    batch = PairCollator(tokenizer, ["anchor", "positive", "negative_1", "unlabeled"], 16)([table[0], table[1]])
    assert (batch["counts"], batch["unlabeled"], len(batch["input_ids"])) == ((2, 2, 1), 2, 7)
    assert tokenizer.decode(batch["input_ids"][-1], skip_special_tokens=True) == unlabeled[1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["one"], "unlabeled_texts: there are 1, fewer than the 2 of one batch"),
        (["one", " "], "unlabeled_texts: item 1 is empty"),
        (["one", 2], "texts: item 1 is a int"),
    ],
)
def test_wrong_unlabeled_texts_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        add_unlabeled_texts(Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}), texts, seed=0, batch=2)


def test_projections_are_fitted_to_texts_of_every_table_and_without_labels():
    tables = [Dataset.from_dict({"anchor": SENTENCES[i : i + 3], "positive": SENTENCES[i + 3 : i + 6]}) for i in (0, 6)]
    joined = join_tables(tables)
    assert sorted(texts_to_fit(tables, joined, seed=0)) == sorted(SENTENCES[:12])
    joined = add_unlabeled_texts(joined, SENTENCES[12:18], seed=0, batch=3)
    assert sorted(texts_to_fit(tables, joined, seed=0)) == sorted(SENTENCES[:18])
