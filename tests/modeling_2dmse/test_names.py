"""Names of sentence-transformers: they do what they do there, or one line names the argument."""

import numpy as np
import pandas
import pytest
import torch
from conftest import SENTENCES

from modeling_2dmse import TwoDMSEModel

PROMPTS = {"query": "the girl ", "document": "a man ", "other": "a dog "}


def test_texts_by_their_names_and_the_device(tiny_model):
    model = tiny_model()
    expected = model.encode(SENTENCES, 2)
    for given in ({"sentences": SENTENCES}, {"inputs": SENTENCES}, {"texts": SENTENCES, "device": "cpu"}):
        assert (model.encode(num_layers=2, **given) == expected).all()
    assert model.encode(sentences=SENTENCES[0]).shape == (32,)
    assert model.encode(sentences=[]).shape == (0, 32)
    for given, message in (
        ({"texts": SENTENCES, "sentences": SENTENCES}, "texts: texts and sentences are names of one argument"),
        ({}, "texts: a NoneType is not allowed"),
        ({"texts": SENTENCES, "device": 1.5}, "device: 1.5 is not allowed; name one device"),
        ({"texts": SENTENCES, "prompt": 5}, "prompt: 5 is not allowed; give one text"),
        ({"texts": pandas.DataFrame({"a": SENTENCES})}, "texts: a DataFrame is not allowed"),
        ({"texts": b"a text"}, "texts: a bytes is not allowed"),
        ({"texts": SENTENCES, "device": ["cpu", "cpu"]}, r"device: \['cpu', 'cpu'\] is not allowed; name one device"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(**given)


@pytest.mark.parametrize("default", [None, "other"])
@pytest.mark.parametrize("prompts", [PROMPTS, {"other": "a dog "}])
def test_queries_documents_and_similarity_as_in_sentence_transformers(prompts, default, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = tiny_model(prompts=prompts)
    model.config.default_prompt_name = default
    model.config.similarity = "dot" if default else "cosine"
    model.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    texts = SENTENCES[:4]
    for name in ("encode_query", "encode_document"):
        ours, theirs = getattr(model, name), getattr(stock, name)
        for options in (
            {},
            {"prompt": "a "},
            {"prompt_name": "other"},
            {"truncate_dim": 8, "normalize_embeddings": True},
        ):
            if default and "truncate_dim" in options:
                continue  # it would normalise, and embeddings that are compared by dot product are not
            assert np.allclose(ours(texts, **options), theirs(texts, **options), atol=1e-5)
    prompt = prompts.get("query", "")
    assert (model.encode_query(sentences=texts, num_layers=2) == model.encode(texts, 2, prompt=prompt)).all()
    assert (model.encode_query(texts, 2, 8) == model.encode(texts, 2, 8, prompt=prompt)).all()
    queries, documents = model.encode_query(texts), 3 * model.encode_document(SENTENCES)
    expected = stock.similarity(queries, documents)
    assert expected.shape == (4, len(SENTENCES))
    for first, second in ((queries, documents), (torch.from_numpy(queries), [*documents]), ([*queries], documents)):
        assert torch.allclose(model.similarity(first, second), expected, atol=1e-5)
    assert torch.allclose(model.similarity(queries[0], documents), expected[:1], atol=1e-5)


def test_embeddings_that_cannot_be_compared(tiny_model):
    model = tiny_model()
    eight, sixteen = (model.encode(SENTENCES, dim=dim) for dim in (8, 16))
    with pytest.raises(
        ValueError, match="embeddings2: they have 16 dimensions, embeddings1 8; encode both at one size"
    ):
        model.similarity(eight, sixteen)
    with pytest.raises(ValueError, match="embeddings2: embeddings of precision binary are bits"):
        model.similarity(eight, model.encode(SENTENCES, precision="binary"))


def test_the_size_of_a_load_by_its_names(tiny_model, tmp_path):
    from transformers import AutoModel

    model = tiny_model()
    model.save_pretrained(tmp_path)
    for kind in (TwoDMSEModel, AutoModel):
        for given in ({"size": "2x8"}, {"size": (2, 8)}, {"num_layers": 2, "truncate_dim": 8}):
            small = kind.from_pretrained(tmp_path, **given)
            assert (small.num_layers, small.config.dim) == (2, 8)
            assert np.allclose(small.encode(SENTENCES), model.encode(SENTENCES, 2, 8), atol=1e-6)
        for given, message in (
            ({"size": "2by8"}, "^size: '2by8' is not a size"),
            ({"size": "9x8"}, "num_layers: 9 is not allowed; this model has 1 to 4"),
            ({"truncate_dim": 64}, "dim: 64 is not allowed; this model has 1 to 32"),
            ({"num_layers": True}, "num_layers: True is not allowed"),
            ({"dim": True}, "dim: True is not allowed"),
            ({"dim": 8.0}, "dim: 8.0 is not allowed"),
        ):
            with pytest.raises(ValueError, match=message):
                kind.from_pretrained(tmp_path, **given)
    with pytest.raises(ValueError, match="size: 2x8 sets layers and dimensions"):
        TwoDMSEModel.from_pretrained(tmp_path, size="2x8", dim=8)
