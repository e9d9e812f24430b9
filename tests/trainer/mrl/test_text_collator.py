"""Batches of labeled texts and pairs of texts are those of the tokenizer, padded on the right."""

import pytest
import torch
from conftest import SENTENCES
from transformers import BertTokenizer

from trainer.mrl.data import TextCollator


@pytest.fixture(scope="module")
def bert():
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    return BertTokenizer(vocab=vocabulary)


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_that_of_the_tokenizer(bert, columns, side):
    bert.padding_side = bert.truncation_side = side
    texts = [*SENTENCES, " ".join(SENTENCES[:3]), ""]
    rows = [
        {"text": text, "other": other, "label": number}
        for number, (text, other) in enumerate(zip(texts, reversed(texts), strict=True))
    ]
    batch = TextCollator(bert, columns, 12)(rows)
    given = [[row[name] for row in rows] for name in columns]
    expected = bert(*given, truncation=True, max_length=12, padding=True, padding_side="right", return_tensors="pt")
    assert expected["attention_mask"].shape[1] == 12, "some are truncated"
    types = expected.pop("token_type_ids")
    assert types.any() == (len(columns) == 2)
    assert torch.equal(batch.pop("token_type_ids", torch.zeros_like(types)), types)
    assert batch.pop("labels").tolist() == [row["label"] for row in rows]
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
        assert batch[name].dtype == value.dtype
