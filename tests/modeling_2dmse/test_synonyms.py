"""What users of transformers, sentence-transformers and PEFT type, and lengths that are not allowed."""

import json

import numpy as np
import pytest
import torch
from conftest import SENTENCES, run_elsewhere
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from modeling_2dmse import TwoDMSEConfig, TwoDMSEModel


def test_names_of_a_size(tiny_model):
    model = tiny_model()
    expected = model.encode(SENTENCES, 2, 16)
    for given in ({"size": "2x16"}, {"num_layers": 2, "truncate_dim": 16}, {"size": (2, 16)}):
        for unit in (None, True, False):
            assert (model.encode(SENTENCES, normalize_embeddings=unit, **given) == expected).all()
    assert (model.encode(SENTENCES, size="2x16", convert_to_numpy=True) == expected).all()
    with pytest.raises(ValueError, match="num_hidden_layers: 2 cannot be set; set num_layers, which has 1 to 4"):
        TwoDMSEConfig.from_dict(model.config.to_dict(), num_hidden_layers=2)
    for given, message in (
        ({"size": "2x16", "dim": 16}, "size: 2x16 sets layers and dimensions; leave out"),
        ({"dim": 8, "truncate_dim": 16}, "truncate_dim: 16 differs from dim, 8"),
        ({"size": "2by16"}, "is not a size"),
        ({"size": "9x16"}, "num_layers: 9 is not allowed"),
        ({"truncate_dim": 33}, "dim: 33 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(SENTENCES, **given)


def test_integers_of_numpy(tiny_model, tmp_path):
    model, two, dim = tiny_model(), np.int64(2), np.int32(16)
    expected = model.encode(SENTENCES, 2, 16, batch_size=4, max_length=8)
    assert (model.encode(SENTENCES, two, dim, batch_size=np.int64(4), max_length=np.int16(8)) == expected).all()
    model.truncate(two, dim).save_pretrained(tmp_path / "cut")
    cut = TwoDMSEModel.from_pretrained(tmp_path / "cut")
    assert np.allclose(cut.encode(SENTENCES, max_length=8), expected, atol=1e-6)  # in other batches
    model.save_pretrained(tmp_path / "whole")
    loaded = TwoDMSEModel.from_pretrained(tmp_path / "whole", num_layers=two, dim=dim)
    loaded.save_pretrained(tmp_path / "loaded")
    assert np.allclose(loaded.encode(SENTENCES, max_length=8), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"batch_size: np\.float64"):
        model.encode(SENTENCES, batch_size=np.float64(4))


@pytest.mark.parametrize("length", [0, 1, 2, -1, 2.5, True, "8"])
def test_lengths_that_are_not_allowed(length, tiny_model):
    with pytest.raises(ValueError, match=r"max_length: .* is not allowed; use a whole number from 3"):
        tiny_model().encode(SENTENCES, max_length=length)


@pytest.mark.parametrize("texts", ["", [""], ["", "a"], ["a", "", "a man"]])
@pytest.mark.parametrize("pad", [True, False])
def test_an_empty_text_has_one_vector_whatever_comes_with_it(texts, pad, tiny_model):
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "man": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tiny_model()
    special = {"pad_token": "[PAD]"} if pad else {"eos_token": "[UNK]"}
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **special)
    expected = model.encode([""])[0]
    assert np.isfinite(expected).all()
    got = model.encode(texts)
    got = got[None] if isinstance(texts, str) else got
    for text, vector in zip([texts] if isinstance(texts, str) else texts, got, strict=True):
        assert text or np.allclose(vector, expected, atol=1e-6)


def test_a_size_with_a_configuration(tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = TwoDMSEConfig.from_pretrained(tmp_path)
    for kind in (TwoDMSEModel, AutoModel):
        small = kind.from_pretrained(tmp_path, config=config, num_layers=2, dim=8)
        assert len(small.backbone.encoder.layer) == 2
        assert np.allclose(small.encode(SENTENCES), model.encode(SENTENCES, 2, 8), atol=1e-6)
    assert (config.num_layers, config.dim) == (4, 32), "the configuration that is given does not change"
    with pytest.raises(ValueError, match="num_layers: 9 is not allowed"):
        TwoDMSEModel.from_pretrained(tmp_path, config=config, num_layers=9)
    model.truncate(3, 16).save_pretrained(tmp_path / "cut")
    for folder, whole in ((tmp_path, 32), (tmp_path / "cut", 16)):
        for name in ("model_kwargs", "config_kwargs"):
            for size in ({"num_layers": 2}, {"dim": 8}, {"num_layers": 2, "truncate_dim": 8}, {"size": "2x8"}):
                stock = SentenceTransformer(str(folder), **{name: size}, trust_remote_code=True, device="cpu")
                expected = TwoDMSEModel.from_pretrained(folder, **size).encode(SENTENCES)
                assert expected.shape[1] == (8 if len(size) == 2 or "num_layers" not in size else whole)
                assert np.allclose(stock.encode(SENTENCES), expected, atol=1e-6)


@pytest.mark.parametrize("through", ["model", "backbone"])
def test_a_resized_vocabulary_is_saved(through, tiny_model, tmp_path):
    model = tiny_model()
    model.tokenizer.add_tokens(["zeppelin", "quokka"])
    rows = max(len(model.tokenizer), 160) + 2
    (model if through == "model" else model.backbone).resize_token_embeddings(rows)
    assert model.get_input_embeddings().num_embeddings == rows
    model.save_pretrained(tmp_path)
    again = TwoDMSEModel.from_pretrained(tmp_path)
    texts = ["a zeppelin and a quokka"]
    assert np.allclose(again.encode(texts), model.encode(texts), atol=1e-6)
    assert np.allclose(model.truncate(2).encode(texts), again.truncate(2).encode(texts), atol=1e-6)


def test_new_words_without_embeddings_are_named(tiny_model):
    model = tiny_model()
    rows = model.get_input_embeddings().num_embeddings
    model.tokenizer.add_tokens(["zeppelin", *(f"word{number}" for number in range(rows))])
    model.encode(SENTENCES)
    with pytest.raises(ValueError, match=rf"it has token \d+, but the model has {rows} word embeddings; after add_tok"):
        model.encode(["a", f"word{rows - 1}"], 1)


def test_adapters_for_feature_extraction(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    expected = model.encode(SENTENCES)
    settings = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"])
    adapted = get_peft_model(model, settings).eval()
    batch = model.tokenizer(SENTENCES[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = adapted(batch["input_ids"], batch["attention_mask"], layers=[4]).layer_embeddings[0]
    assert np.allclose(torch.nn.functional.normalize(output, dim=-1).numpy(), expected[:3], atol=1e-5)
    with pytest.raises(ValueError, match="output_hidden_states: this model returns pooled states only"):
        adapted(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)


@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_losses_over_layers_of_sentence_transformers_are_refused(name, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    tiny_model().save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    base = losses.MultipleNegativesRankingLoss(stock)
    loss = getattr(losses, name)(stock, base, **({"matryoshka_dims": [32, 8]} if name == "Matryoshka2dLoss" else {}))
    batch = [stock.preprocess(SENTENCES[:3]), stock.preprocess(SENTENCES[3:6])]
    with pytest.raises(ValueError, match="output_hidden_states: this model returns pooled states only"):
        loss(batch, None)
    assert len(stock.encode(SENTENCES[:2])) == 2, "the model is as it was"


def test_the_saved_tokenizer_truncates_at_the_longest_input_of_the_model(tiny_model, tmp_path):
    model = tiny_model()
    model.tokenizer.backend_tokenizer.enable_truncation(5)
    model.encode(SENTENCES, max_length=6)
    model.save_pretrained(tmp_path / "whole")
    model.export(tmp_path / "export", 2)
    for name in ("whole", "export"):
        ids = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")).encode(" ".join(SENTENCES)).ids
        assert len(ids) == model.max_length == 48
    model.tokenizer.backend_tokenizer.no_truncation()
    model.tokenizer.model_max_length = 10**30
    model.save_pretrained(tmp_path / "whole")
    saved = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 64, "the backbone's positions"


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_the_saved_tokenizer_has_a_class_of_every_version_of_transformers(family, tiny_model, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    model.export(tmp_path / "export", 2)
    for name in ("whole", "export"):
        saved = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert type(again) is type(model.tokenizer)
        assert again(SENTENCES)["input_ids"] == model.tokenizer(SENTENCES)["input_ids"]


OLD = """
import sys, transformers
transformers.__version__ = "4.57.1"
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    assert str(error) == "2DMSE models need transformers 5 or newer, not 4.57.1; upgrade transformers", error
else:
    raise AssertionError("loaded")
"""


def test_a_process_with_an_older_transformers_says_what_is_needed(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    run_elsewhere(OLD, tmp_path, str(tmp_path / "model"))
