"""Texts for pre-training: every format, packing, streams, and wrong files."""

import gzip
import json

import datasets
import numpy as np
import pytest
from conftest import SENTENCES

from modeling_2dmse.tokens import tokenize_words
from trainer.shared.texts import read_corpus
from trainer.smae.corpus import endless, pack
from trainer.unlabeled import read_unlabeled_texts


def _write(folder, suffix):
    path = folder / f"texts{suffix}"
    if suffix.endswith(".gz"):
        inner = _write(folder, suffix[:-3])
        path.write_bytes(gzip.compress(inner.read_bytes()))
    elif suffix == ".txt":
        path.write_text("\n".join(["too short", "", *SENTENCES]) + "\n")
    elif suffix == ".csv":
        path.write_text("id,body\n0,too short\n" + "".join(f"{i},{text}\n" for i, text in enumerate(SENTENCES, 1)))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in ["too short", *SENTENCES]))
    else:
        datasets.Dataset.from_dict({"body": ["too short", *SENTENCES]}).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_its_texts_of_three_words(tmp_path, suffix, streaming):
    column = "text" if suffix.startswith(".txt") else "body"
    table = read_corpus(str(_write(tmp_path, suffix)), column, streaming)
    assert [row["text"] for row in table] == [text for text in SENTENCES if len(text.split()) >= 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_loses_no_token_and_fills_the_blocks(tmp_path, tokenizer, streaming):
    table = read_corpus(str(_write(tmp_path, ".txt")), "text", streaming)
    tokens, _ = tokenize_words(tokenizer, [row["text"] for row in table])
    rows = np.split(tokens.ids, tokens.starts[1:-1])
    joined = [token for row in rows for token in [*row.tolist(), tokenizer.sep_token_id]][:-1]
    blocks = list(pack(table, tokenizer, 16))
    assert [token for block in blocks for token in block["input_ids"]] == joined
    assert {len(block["input_ids"]) for block in blocks[:-1]} == {14}
    for block in blocks:
        assert len(block["words"]) == len(block["input_ids"])
        for token, word in zip(block["input_ids"], block["words"], strict=True):
            assert (word == -1) == (token == tokenizer.sep_token_id)


def test_a_stream_starts_again_and_numbers_its_rows(tmp_path):
    table = read_corpus(str(_write(tmp_path, ".txt")), "text", streaming=True)
    count = len(list(table))
    rows = [row for row, _ in zip(endless(table, seed=0), range(2 * count + 3), strict=False)]
    assert [row["position"] for row in rows] == list(range(2 * count + 3))
    texts = [row["text"] for row in rows]
    assert sorted(texts[:count]) == sorted(texts[count : 2 * count])
    assert texts[:count] != [row["text"] for row in table]


def test_wrong_files_are_refused(tmp_path):
    def refused(path, message, column="text", **kwargs):
        with pytest.raises(ValueError, match=message):
            read_corpus(str(path), column, **kwargs)

    refused(tmp_path / "absent.txt", "train_file: .*absent.txt is not a file")
    (tmp_path / "empty.txt").touch()
    refused(tmp_path / "empty.txt", "train_file: .*empty.txt is empty")
    (tmp_path / "short.txt").write_text("one two\nthree\n\n")
    for streaming in (False, True):
        refused(tmp_path / "short.txt", "train_file: no text has 3 words or more", streaming=streaming)
        refused(
            _write(tmp_path, ".csv"), r"there is no column text \(--text_column\) among id, body", streaming=streaming
        )
    refused(
        _write(tmp_path, ".txt"), "text_column: .* has no column body; the column of a .txt file is text", column="body"
    )
    (tmp_path / "texts.doc").write_text("some words here")
    refused(tmp_path / "texts.doc", "eval_file: .* has an unknown format", argument="eval_file")


def test_unlabeled_texts_come_from_lines_corpora_and_training_tables(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join([*SENTENCES, SENTENCES[0]]))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in SENTENCES))
    pairs = zip(SENTENCES[::2], SENTENCES[1::2], strict=True)
    (tmp_path / "pairs.csv").write_text("\n".join(["anchor,positive", *(f"{a},{b}" for a, b in pairs)]))
    for name in ("lines.txt", "corpus.jsonl", "pairs.csv"):
        path = str(tmp_path / name)
        texts = read_unlabeled_texts(path, 100, seed=0)
        assert sorted(texts) == sorted(SENTENCES), "all of them once"
        assert len(set(read_unlabeled_texts(path, 6, seed=0))) == 6
        assert read_unlabeled_texts(path, 6, seed=0) == read_unlabeled_texts(path, 6, seed=0)
        assert read_unlabeled_texts(path, 6, seed=0) != read_unlabeled_texts(path, 6, seed=1)
    (tmp_path / "other.csv").write_text("colour,shape\na,b\n")
    for name, message in (("absent.txt", "is not a file"), ("other.csv", "no column text among colour, shape, nor")):
        with pytest.raises(ValueError, match=f"unlabeled_file: .*{message}"):
            read_unlabeled_texts(str(tmp_path / name), 9, seed=0)
