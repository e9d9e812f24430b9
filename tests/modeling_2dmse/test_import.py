"""`from_backbone` of sentence-transformers folders: the vectors of `SentenceTransformer(folder)`, or an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from safetensors.torch import save
from transformers import AutoModel

from modeling_2dmse import TwoDMSEModel
from run_scripts.shared import models
from trainer.projections import fit_exit_projections

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules as parts  # noqa: E402

# From no word at all to far more tokens than the tiny models take.
TEXTS = ["", "a", *SENTENCES, *(" ".join(SENTENCES[:n]) for n in range(2, 20, 3)), "A man Plays THE guitar"]


def dense(rows: int, columns: int = 32, **settings):
    torch.manual_seed(rows)
    identity = {"bias": False, "activation_function": torch.nn.Identity()}
    return parts.Dense(columns, rows, **(identity | settings))


# name: (family, settings of the Transformer module, modules after it, settings of SentenceTransformer)
SHAPES = {
    "plain": ("bert", {}, ["mean", "normalize"], {}),
    "short": ("bert", {"max_seq_length": 12}, ["mean", "normalize"], {}),
    "shortest": ("roberta", {"max_seq_length": 3}, ["mean", "normalize"], {}),
    "long": ("bert", {"max_seq_length": 64}, ["mean", "normalize"], {}),
    "tokenizer length": ("mpnet", {"processor_kwargs": {"model_max_length": 9}}, ["mean"], {}),
    "lower case": ("bert", {"do_lower_case": True}, ["cls", "normalize"], {}),
    "lower case and short": ("roberta", {"do_lower_case": True, "max_seq_length": 7}, ["mean", "normalize"], {}),
    "prompts": ("bert", {}, ["mean"], {"prompts": {"query": "the girl ", "document": ""}}),
    "default prompt": ("bert", {}, ["mean"], {"prompts": {"q": "the girl "}, "default_prompt_name": "q"}),
    "square root": ("bert", {}, ["mean_sqrt_len_tokens", "normalize"], {}),
    "weighted": ("qwen3", {"max_seq_length": 10}, ["weightedmean", "normalize"], {}),
    "last token": ("qwen3", {"max_seq_length": 10}, ["lasttoken", "normalize"], {}),
    "dropout": ("bert", {}, ["mean", parts.Dropout(0.5), "normalize"], {}),
    "dense": ("bert", {}, ["mean", dense(8), "normalize"], {}),
    "two dense": ("bert", {"max_seq_length": 12}, ["mean", dense(48), dense(16, 48), "normalize"], {}),
    "normalize, dense": ("modernbert", {}, ["mean", "normalize", dense(32), "normalize"], {}),
    "cut": ("bert", {}, ["mean", "normalize"], {"truncate_dim": 8}),
    "dense and cut": ("bert", {}, ["mean", dense(16), "normalize"], {"truncate_dim": 8}),
    "dot product": ("bert", {}, ["mean"], {"similarity_fn_name": "dot"}),
    "half": ("bert", {"model_kwargs": {"dtype": "bfloat16"}}, ["mean", "normalize"], {}),
}


def write(shape, backbone_path, folder) -> str:
    family, transformer, rest, settings = shape
    steps = [st.base.modules.Transformer(backbone_path(family), **transformer)]
    for step in rest:
        if step == "normalize":
            steps.append(parts.Normalize())
        else:
            steps.append(parts.Pooling(32, step) if isinstance(step, str) else step)
    st.SentenceTransformer(modules=steps, device="cpu", **settings).save(str(folder))
    return str(folder)


def assert_equal(model: TwoDMSEModel, folder: str, atol: float = 1e-5) -> None:
    stock = st.SentenceTransformer(folder, device="cpu")
    expected = stock.encode(TEXTS, normalize_embeddings=True, batch_size=7)
    got = model.encode(TEXTS)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=atol)
    for name, prompt in stock.prompts.items():
        if name in model.config.prompts:
            prompted = stock.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
            np.testing.assert_allclose(model.encode(TEXTS, prompt_name=name), prompted, atol=atol)
        else:
            assert not prompt


@pytest.mark.parametrize("name", SHAPES)
def test_the_imported_model_gives_the_vectors_of_the_folder(name, backbone_path, tmp_path):
    folder = write(SHAPES[name], backbone_path, tmp_path / "folder")
    atol = 2e-2 if name == "half" else 1e-5
    model = TwoDMSEModel.from_backbone(folder)
    assert_equal(model, folder, atol)
    model.save_pretrained(tmp_path / "saved")
    again = TwoDMSEModel.from_pretrained(tmp_path / "saved")
    assert_equal(again, folder, atol)
    stock = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    theirs = stock.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(theirs, model.encode(TEXTS), atol=atol)
    np.testing.assert_allclose(model.truncate(2).encode(TEXTS), model.encode(TEXTS, num_layers=2), atol=1e-6)


def edit(folder: Path, file: str, **changes) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_folders_of_older_versions(backbone_path, tmp_path):
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    folder = tmp_path / "old"
    shutil.copytree(backbone_path("roberta"), folder / "0_Transformer")
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    edit(folder / "0_Transformer", "sentence_roberta_config.json", max_seq_length=11, do_lower_case=True)
    edit(folder / "1_Pooling", "config.json", word_embedding_dimension=32, pooling_mode_cls_token=True)
    assert_equal(TwoDMSEModel.from_backbone(folder), str(folder))
    assert_equal(models.load_encoder(str(folder)), str(folder))
    edit(folder / "1_Pooling", "config.json", pooling_mode_cls_token=False)  # no flag at all is the mean
    assert_equal(TwoDMSEModel.from_backbone(folder), str(folder))
    for content, message in (
        ("[]", "has a 1_Pooling/config.json that is not a JSON object"),
        ("[" * 100_000, "has a broken config.json: maximum recursion depth"),
        ("{}", "has a Pooling module, whose settings are missing in 1_Pooling/config.json"),
        (None, "has a Pooling module, whose settings are missing in 1_Pooling/config.json"),
    ):
        (folder / "1_Pooling" / "config.json").unlink()
        if content is not None:
            (folder / "1_Pooling" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            TwoDMSEModel.from_backbone(folder)
    for content, message in (("{}", "modules.json that is not a JSON list"), ("[3]", "has 3 in modules.json")):
        (folder / "modules.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            TwoDMSEModel.from_backbone(folder)


def test_a_real_model_on_long_texts():
    from run_scripts.shared.quickstart import minilm_path

    model, words = TwoDMSEModel.from_backbone(minilm_path()), " ".join(SENTENCES)
    texts = [words, " ".join([words] * 3), " ".join([words] * 9), "Short"]
    stock = st.SentenceTransformer(minilm_path(), device="cpu")
    assert model.max_length == stock.max_seq_length == 256
    np.testing.assert_allclose(model.encode(texts), stock.encode(texts), atol=1e-5)


REFUSED = {
    "max pooling": (["max"], "has the pooling max in 1_Pooling"),
    "two poolings": ([["cls", "mean"]], "has the pooling cls and mean in 1_Pooling"),
    "prompt": ([parts.Pooling(32, "mean", include_prompt=False)], "leaves out the prompt"),
    "tanh": (["mean", dense(8, activation_function=torch.nn.Tanh())], r"2_Dense \(Dense with activation Tanh\)"),
    "bias": (["mean", dense(8, bias=True)], r"2_Dense \(Dense with bias\)"),
    "residual": (["mean", dense(32, use_residual=True)], r"2_Dense \(Dense with use_residual\)"),
    "layer norm": (["mean", parts.LayerNorm(32)], r"2_LayerNorm \(LayerNorm\)"),
    "wide": (["mean", dense(64)], "a Dense module to 64 dimensions, more than the encoder's 32"),
    "tokens": ([dense(32, module_input_name="token_embeddings"), "mean"], r"1_Dense \(Dense\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_over_is_refused_by_name(name, backbone_path, tmp_path, caplog):
    rest, message = REFUSED[name]
    rest = [parts.Pooling(32, tuple(step)) if isinstance(step, list) else step for step in rest]
    folder = write(("bert", {}, rest, {}), backbone_path, tmp_path / "folder")
    with pytest.raises(ValueError, match=message) as error:
        TwoDMSEModel.from_backbone(folder)
    assert "with pooling set, for example to mean" in str(error.value)
    plain = TwoDMSEModel.from_backbone(backbone_path("bert"))
    with_pooling = TwoDMSEModel.from_backbone(folder, pooling="mean")
    np.testing.assert_allclose(with_pooling.encode(SENTENCES), plain.encode(SENTENCES), atol=1e-6)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, 'transformer_task="fill-mask"'),
        ("sentence_bert_config.json", {"query_length": 8}, "query_length=8"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
            "modality_config",
        ),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "has a SparseEncoder"),
        ("config_sentence_transformers.json", {"default_prompt_name": "no"}, "the default prompt 'no'"),
        ("sentence_bert_config.json", {"max_seq_length": 11.0}, "max_seq_length=11.0, which is not a whole number"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length=0, which is not a whole number"),
        ("sentence_bert_config.json", {"processor_kwargs": {"model_max_length": "9"}}, 'model_max_length="9"'),
        ("sentence_bert_config.json", {"model_args": [1]}, r"model_args=\[1\], which is not a JSON object"),
        ("config_sentence_transformers.json", {"prompts": "a"}, 'prompts="a", which is not a JSON object'),
        ("config_sentence_transformers.json", {"truncate_dim": "8"}, 'truncate_dim="8", which is not a whole number'),
        ("2_Dense/config.json", {"activation_function": None}, "Dense with activation None"),
    ],
)
def test_settings_that_cannot_be_taken_over_are_refused_by_name(file, changes, message, backbone_path, tmp_path):
    folder = write(SHAPES["dense"], backbone_path, tmp_path / "folder")
    edit(Path(folder), file, **changes)
    with pytest.raises(ValueError, match=message):
        TwoDMSEModel.from_backbone(folder)


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"type": "sentence_transformers.models.StaticEmbedding"}, "StaticEmbedding as its first module"),
        (0, {"type": "custom_st.Transformer"}, "custom_st.Transformer as its first module"),
        (1, {"type": "sentence_transformers.models.LSTM"}, r"1_Pooling \(LSTM\)"),
        (1, {"type": "pylate.models.Pooling"}, r"pylate.models.Pooling"),
        (1, {"path": "../elsewhere"}, "not inside of the folder"),
    ],
)
def test_modules_that_are_unknown_are_refused_by_name(index, changes, message, backbone_path, tmp_path):
    folder = Path(write(SHAPES["plain"], backbone_path, tmp_path / "folder"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[index] |= changes
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        TwoDMSEModel.from_backbone(folder)


def test_damaged_weights_of_a_dense_module_are_refused_by_name(backbone_path, tmp_path):
    folder = Path(write(SHAPES["dense"], backbone_path, tmp_path / "folder"))
    file = folder / "2_Dense" / "model.safetensors"
    for content, message in (
        (b"abc", "model.safetensors cannot be read"),
        (save({"other": torch.ones(8, 32)}), "not those of one linear layer"),
        (save({"linear.weight": torch.ones(8)}), "not those of one linear layer"),
        (save({"linear.weight": torch.full((8, 32), torch.nan)}), "not finite"),
        (save({"linear.weight": torch.ones(8, 32, dtype=torch.int8)}), "not finite floating-point numbers"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"2_Dense \(Dense\), whose .*{message}"):
            TwoDMSEModel.from_backbone(folder)
    file.unlink()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"whose pytorch_model.bin cannot be read"):
        TwoDMSEModel.from_backbone(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bertt"}, "is of the model type 'bertt', which transformers .* did you mean bert"),
        ({"model_type": "pix2struct"}, "'pix2struct', which transformers .* cannot load as an encoder; name a text"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B", "AutoModel": "a.C"}}, "trust_remote_code"),
    ],
)
def test_an_unknown_type_of_model_is_refused_without_a_list_of_all(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as refused:
        TwoDMSEModel.from_backbone(tmp_path)
    assert len(str(refused.value)) < 500 or "auto_map" in config
    with pytest.raises(ValueError, match=f"^model_name_or_path: .*({message})"):
        models.load_encoder(str(tmp_path))


def test_adapters_of_peft_are_refused_by_name(backbone_path, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = AutoModel.from_pretrained(backbone_path("bert"))
    adapted.add_adapter(peft.LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has adapters of PEFT; merge them into their model first"):
        TwoDMSEModel.from_backbone(tmp_path)


def test_a_dense_module_bounds_the_sizes_and_survives_a_fit(backbone_path, tmp_path):
    folder = write(SHAPES["dense"], backbone_path, tmp_path / "folder")
    with pytest.raises(ValueError, match="the Dense module of the folder gives 8 dimensions"):
        TwoDMSEModel.from_backbone(folder, sizes=["1x4", "4x16"])
    model = TwoDMSEModel.from_backbone(folder, sizes=["1x4", "4x8"])
    before = model.encode(TEXTS)
    fit_exit_projections(model, TEXTS)
    after = model.encode(TEXTS)
    assert abs(after - before).max() > 1e-2, "the strongest directions come first"
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-4)


def test_vectors_of_different_lengths_are_not_lost_silently(backbone_path, tmp_path, caplog):
    import logging

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for steps, settings, message in (
            (["mean"], {"similarity_fn_name": "dot"}, "by dot, and they differ in length"),
            (["mean", "normalize"], {"similarity_fn_name": "euclidean"}, ""),  # the order of cosine
            (["mean", "normalize"], {"similarity_fn_name": "manhattan"}, "by manhattan; the elastic model's"),
            (["mean", "normalize"], {"similarity_fn_name": "dot", "truncate_dim": 8}, "by dot, and they differ"),
        ):
            caplog.clear()
            TwoDMSEModel.from_backbone(write(("bert", {}, steps, settings), backbone_path, tmp_path / "folder"))
            assert message in caplog.text
            assert bool(message) == ("compares its vectors" in caplog.text)
    finally:
        logger.removeHandler(caplog.handler)


def test_own_prompts_come_in_addition(backbone_path, tmp_path):
    folder = write(SHAPES["default prompt"], backbone_path, tmp_path / "folder")
    model = TwoDMSEModel.from_backbone(folder, prompts={"d": "a cat "})
    assert model.config.prompts == {"q": "the girl ", "d": "a cat "} | {
        name: text for name, text in model.config.prompts.items() if not text
    }
    assert model.config.default_prompt_name == "q"
