"""The saved folder on its own: loaded with remote code and by sentence-transformers, and refused if it is broken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, run_elsewhere
from safetensors.torch import load_file, save_file

from modeling_2dmse import Size, TwoDMSEModel, truncation
from modeling_2dmse.sentence_transformers_files import write_exported_modules

LOAD_ELSEWHERE = """
import sys
assert not any("modeling_2dmse" in name for name in sys.modules)
import numpy as np
from transformers import AutoConfig, AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without trust_remote_code")
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
small = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, num_layers=2)
texts = open(sys.argv[2]).read().splitlines()
# As sentence-transformers loads it, with a configuration whose class transformers has imported separately.
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
same = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, config=config, size="2x16")
assert (same.encode(texts) == small.encode(texts, dim=16)).all()
np.savez(sys.argv[3], full=model.encode(texts, dim=16), small=small.encode(texts, dim=16))
try:
    import modeling_2dmse
except ImportError:
    pass
else:
    raise AssertionError("the project is on the path; this proves nothing")
"""


@pytest.mark.parametrize(("family", "projected"), [("bert", False), ("qwen3", False), ("bert", True)])
def test_remote_code_in_a_fresh_process(family, projected, tiny_model, tmp_path):
    model = tiny_model(family, projected, gated=projected)
    model.save_pretrained(tmp_path / "here")
    elsewhere = shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    (tmp_path / "texts").write_text("\n".join(SENTENCES))
    run_elsewhere(LOAD_ELSEWHERE, tmp_path, str(elsewhere), str(tmp_path / "texts"), str(tmp_path / "out.npz"))
    got = np.load(tmp_path / "out.npz")
    assert np.allclose(got["full"], model.encode(SENTENCES, dim=16), atol=1e-6)
    assert np.allclose(got["small"], model.encode(SENTENCES, num_layers=2, dim=16), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("projected", [False, True])
def test_stock_sentence_transformers_with_the_size_per_call(projected, pooling, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = tiny_model(projected=projected, pooling=pooling)
    model.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert [type(module).__module__.split(".")[0] for module in stock] == ["sentence_transformers"] * 3
    for n in (1, 3, 4):
        theirs = stock.encode(SENTENCES, num_layers=n)
        assert np.allclose(theirs, model.encode(SENTENCES, num_layers=n), atol=1e-6)
    cut = stock.encode(SENTENCES, num_layers=2, truncate_dim=8, normalize_embeddings=True)
    assert np.allclose(cut, model.encode(SENTENCES, num_layers=2, dim=8), atol=1e-6)


def test_more_of_stock_sentence_transformers(tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    from trainer.evaluation import StsData, evaluate_sts

    model = tiny_model(prompts={"query": "the girl "})
    model.save_pretrained(tmp_path / "a")
    stock = SentenceTransformer(str(tmp_path / "a"), trust_remote_code=True, device="cpu")
    ours = model.encode(SENTENCES)
    assert np.allclose(stock.similarity(*[stock.encode(SENTENCES)] * 2).numpy(), ours @ ours.T, atol=1e-5)
    prompted = stock.encode(["is reading"], prompt_name="query", num_layers=2)
    assert np.allclose(prompted, model.encode(["is reading"], 2, prompt_name="query"), atol=1e-6)
    stock.save(str(tmp_path / "b"))
    again = SentenceTransformer(str(tmp_path / "b"), trust_remote_code=True, device="cpu")
    assert np.allclose(again.encode(SENTENCES, num_layers=3), model.encode(SENTENCES, 3), atol=1e-6)
    data = StsData("s", SENTENCES[:10], SENTENCES[10:], [i / 10 for i in range(10)])
    evaluator = EmbeddingSimilarityEvaluator(data.sentence1, data.sentence2, data.score)
    assert evaluator(stock)["spearman_cosine"] == pytest.approx(
        evaluate_sts(model, data, [Size(4, 32)])["spearman"]["4x32"], abs=1e-9
    )
    small = model.truncate(2, 8)
    small.save_pretrained(tmp_path / "c")
    cut = SentenceTransformer(str(tmp_path / "c"), trust_remote_code=True, device="cpu")
    assert np.allclose(cut.encode(SENTENCES, normalize_embeddings=True), small.encode(SENTENCES), atol=1e-6)


@pytest.mark.parametrize(("projected", "similarity"), [(False, "cosine"), (True, "cosine"), (False, "dot")])
def test_a_cut_folder_normalises_after_the_cut_in_sentence_transformers(projected, similarity, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = tiny_model(projected=projected)
    model.config.similarity = similarity
    model.truncate(2, 8).save_pretrained(tmp_path / "cut")
    stock = SentenceTransformer(str(tmp_path / "cut"), trust_remote_code=True, device="cpu")
    vectors, expected = stock.encode(SENTENCES), model.encode(SENTENCES, num_layers=2, dim=8)
    assert np.allclose(vectors, expected, atol=1e-6)
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6) == (similarity == "cosine")
    assert np.allclose(stock.encode(SENTENCES, num_layers=1), model.encode(SENTENCES, 1, 8), atol=1e-6)
    again = TwoDMSEModel.from_pretrained(tmp_path / "cut")
    assert np.allclose(again.encode(SENTENCES), expected, atol=1e-6)


def test_the_folder_of_an_earlier_cut_model_whose_dense_module_cuts(tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = tiny_model(projected=True)
    small = model.truncate(2, 8)
    small.save_pretrained(tmp_path / "old")
    write_exported_modules(str(tmp_path / "old"), small.config, 48, torch.eye(8, 32))  # as it was written then
    expected = model.encode(SENTENCES, 2, 8)
    again = TwoDMSEModel.from_pretrained(tmp_path / "old")
    assert np.allclose(again.encode(SENTENCES), expected, atol=1e-6)
    stock = SentenceTransformer(str(tmp_path / "old"), trust_remote_code=True, device="cpu")
    assert np.allclose(stock.encode(SENTENCES), expected, atol=1e-6)
    stock.save(str(tmp_path / "stock"))
    again.save_pretrained(tmp_path / "new")
    for name in ("stock", "new"):
        stock = SentenceTransformer(str(tmp_path / name), trust_remote_code=True, device="cpu")
        assert np.allclose(stock.encode(SENTENCES), expected, atol=1e-6)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # not in silence
        SentenceTransformer(str(tmp_path / "old"), model_kwargs={"dim": 4}, device="cpu").encode(SENTENCES)


def test_weights_that_do_not_fill_the_model_are_refused(tiny_model, tmp_path):
    tiny_model().truncate(2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_layers"] = config["backbone_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the weights lack 32 of the tensors"):
        TwoDMSEModel.from_pretrained(tmp_path)


def test_a_truncated_weights_file_is_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|header|metadata"):
        TwoDMSEModel.from_pretrained(tmp_path)


def test_tensors_of_the_wrong_shape_are_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.encoder.layer.1.output.dense.bias"
    tensors[name] = tensors[name][:8].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)):
        TwoDMSEModel.from_pretrained(tmp_path)


def test_only_safetensors_and_the_tokenizer_are_written(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "modeling_2dmse.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


def test_the_folder_has_the_code_that_it_needs(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    project = {path.name for path in (Path(__file__).parents[2] / "modeling_2dmse").glob("*.py")}
    pre_training = {"configuration_smae.py", "masked_loss.py", "mlm_head.py", "modeling_smae.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == project - pre_training - {"__init__.py"}


def test_a_model_without_a_tokenizer_saves_and_says_what_is_missing(tmp_path):
    from modeling_2dmse import TwoDMSEConfig

    config = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
              "intermediate_size": 16, "vocab_size": 30, "max_position_embeddings": 16}  # fmt: skip
    model = TwoDMSEModel(TwoDMSEConfig(backbone_config=config))
    with pytest.raises(ValueError, match="tokenizer: this model was not loaded from a folder"):
        model.encode(["a"])
    model.save_pretrained(tmp_path)
    assert TwoDMSEModel.from_pretrained(tmp_path).num_layers == 2


def test_the_tokenizer_is_found_after_a_change_of_the_working_directory(tiny_model, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = TwoDMSEModel.from_pretrained("model")
    monkeypatch.chdir("/")
    assert model.encode(SENTENCES).shape == (20, 32)
    assert model.config.name_or_path == "model"


def test_a_model_with_adapters_of_transformers_saves_them(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    model = TwoDMSEModel.from_pretrained(tmp_path / "base")
    plain = model.encode(SENTENCES)
    model.add_adapter(peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    assert abs(model.encode(SENTENCES) - plain).max() > 1e-3
    model.save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    again = TwoDMSEModel.from_pretrained(tmp_path / "adapters")
    np.testing.assert_allclose(again.encode(SENTENCES), model.encode(SENTENCES), atol=1e-6)


def test_adapters_of_a_smaller_size_say_how_they_are_loaded(tiny_model, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    warnings: list[str] = []
    monkeypatch.setattr(truncation.logger, "warning", warnings.append)
    tiny_model().save_pretrained(tmp_path / "base")
    for size in ({}, {"num_layers": 2, "dim": 8}):
        model = TwoDMSEModel.from_pretrained(tmp_path / "base", **size)
        model.add_adapter(peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapters")
        again = TwoDMSEModel.from_pretrained(tmp_path / "adapters", **size)
        np.testing.assert_allclose(again.encode(SENTENCES), model.encode(SENTENCES), atol=1e-6)
        assert len(warnings) == len(size) / 2
    assert warnings[0].endswith("has 4x32; load it with num_layers=2 and dim=8")


def test_the_weights_can_be_read_by_whom_the_configuration_can(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    weights = [path.stat().st_mode for path in tmp_path.rglob("*.safetensors")]
    assert len(weights) > 2
    assert set(weights) == {(tmp_path / "config.json").stat().st_mode}
