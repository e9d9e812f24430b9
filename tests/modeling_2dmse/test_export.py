"""One size as a small model: every form of it gives the same vectors, and it contains nothing that it does not need."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SENTENCES
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_2dmse import TwoDMSEModel
from run_scripts.export import main, onnx_encoder

SIZES = [(1, 8), (3, 20), (4, 32)]
# 200 texts of different lengths
TEXTS = [" ".join((SENTENCES[i % 20] + " " + SENTENCES[(i * 7 + 3) % 20]).split()[: 1 + i % 16]) for i in range(200)]


PROJECTED = [("bert", True), ("qwen3", True)]


@pytest.mark.parametrize(
    ("family", "projected"), [*((family, False) for family in ("bert", "mpnet", "modernbert", "qwen3")), *PROJECTED]
)
def test_all_forms_agree(family, projected, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = tiny_model(family, projected)
    for n, d in SIZES:
        expected = model.encode(TEXTS, n, d)
        assert np.allclose(model.truncate(n, d).encode(TEXTS), expected, atol=1e-5)
        plain, onnx = tmp_path / f"plain{n}", tmp_path / f"onnx{n}"
        model.export(plain, n, d)
        stock = SentenceTransformer(str(plain), device="cpu")
        vectors = stock.encode(TEXTS)
        assert vectors.shape == (200, d)
        assert np.allclose(vectors, expected, atol=1e-5)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        again = TwoDMSEModel.from_backbone(plain)
        assert again.config.pooling == model.config.pooling
        assert again.config.dim == d
        assert np.allclose(again.encode(TEXTS), expected, atol=1e-5)
        # torch takes seconds for each layer
        if (n, d) == (SIZES[1] if family == "bert" else SIZES[0]):
            model.export(onnx, n, d, format="onnx")
            assert [path.name for path in (onnx / "onnx").iterdir()] == ["model.onnx"]
            assert np.allclose(onnx_encoder(str(onnx))(TEXTS), expected, atol=1e-5)


def test_all_forms_agree_for_minilm(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    for n, d in ((1, 32), (4, 192), (6, 384)):
        expected = minilm.encode(TEXTS, n, d)
        minilm.export(tmp_path / f"plain{n}", n, d)
        vectors = SentenceTransformer(str(tmp_path / f"plain{n}"), device="cpu").encode(TEXTS)
        assert np.allclose(vectors, expected, atol=1e-5)
    minilm.export(tmp_path / "onnx", n, d, format="onnx")
    assert np.allclose(onnx_encoder(str(tmp_path / "onnx"))(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_backbone_loads_without_remote_code_or_missing_keys(family, tiny_model, tmp_path):
    model = tiny_model(family)
    model.export(tmp_path / "small", 2, 16)
    plain, info = AutoModel.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.config.num_hidden_layers == 2
    assert "auto_map" not in json.loads((tmp_path / "small" / "config.json").read_text())
    assert not list((tmp_path / "small").glob("*.py"))


def test_parameters_and_file_shrink_by_the_size_of_the_layers(tiny_model, tmp_path):
    model = tiny_model()
    for n in (1, 4):
        model.export(tmp_path / str(n), n)
    one_layer = sum(p.numel() for p in model.backbone.encoder.layer[0].parameters())
    counts = {n: sum(t.numel() for t in load_file(tmp_path / str(n) / "model.safetensors").values()) for n in (1, 4)}
    assert counts[4] - counts[1] == 3 * one_layer
    sizes = {n: (tmp_path / str(n) / "model.safetensors").stat().st_size for n in (1, 4)}
    assert 3 * one_layer * 4 <= sizes[4] - sizes[1] <= 3 * one_layer * 4 + 10_000  # weights and their header


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tiny_model, tmp_path):
    model = tiny_model()
    model.export(tmp_path / "half", 2, 16, dtype=dtype)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == getattr(torch, dtype)
    assert model.dtype == torch.float32
    half = TwoDMSEModel.from_backbone(tmp_path / "half").encode(SENTENCES, dim=16)
    assert (half * model.encode(SENTENCES, 2, 16)).sum(1).min() > 0.99


def test_int8_onnx_is_smaller_and_close_and_no_line_of_a_library_is_shown(tiny_model, tmp_path, caplog, recwarn):
    model = tiny_model()
    exporting = logging.getLogger("torch.onnx._internal.exporter._registration")
    exporting.addHandler(caplog.handler)  # torch's loggers do not propagate
    model.export(tmp_path / "int8", 2, 16, format="onnx", dtype="int8")  # which exports float32 first
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn] == []
    exporting.warning("torchvision is not installed. Skipping torchvision::nms")
    logging.getLogger().warning("Please consider to run pre-processing before quantization")
    assert len(caplog.records[-2:]) == 2, "they are hidden while a model is exported, and no longer"
    exporting.removeHandler(caplog.handler)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "int8" / "onnx").iterdir()}
    assert sizes["model_quantized.onnx"] < sizes["model.onnx"]
    cosine = (onnx_encoder(str(tmp_path / "int8"))(SENTENCES) * model.encode(SENTENCES, 2, 16)).sum(1)
    assert cosine.min() > 0.97


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 5}, "num_layers: 5 is not allowed; this model has 1 to 4"),
        ({"dim": 33}, "dim: 33 is not allowed"),
        ({"format": "gguf"}, "format: 'gguf' is unknown; choose one of transformers, onnx"),
        ({"dtype": "int8"}, "dtype: 'int8' is not allowed for transformers"),
        ({"format": "onnx", "dtype": "float16"}, "dtype: 'float16' is not allowed for onnx"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(kwargs, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_model().export(tmp_path / "small", **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_kept(tiny_model, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        tiny_model().export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_failing_export_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch):
    import modeling_2dmse.export as module

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_exported_modules", broken)
    with pytest.raises(OSError, match="disk full"):
        tiny_model().export(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_missing_onnxruntime_names_the_extra(tiny_model, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"format: onnx needs onnxruntime; pip install .*onnx"):
        tiny_model().export(tmp_path / "small", format="onnx")


def test_script(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    rows = ["sentence1,sentence2,score", *(f"{SENTENCES[i]},{SENTENCES[i + 1]},{i % 5}" for i in range(10))]
    (tmp_path / "sts.csv").write_text("\n".join(rows) + "\n")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--num_layers", "1", "--dim", "16"]
    for name, options in (("plain", []), ("onnx", ["--format", "onnx"])):
        out = ["--output_dir", str(tmp_path / name), "--sts_files", str(tmp_path / "sts.csv")]
        main([*flags, *out, *options])
        assert "(+0.0000)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*flags, *out, *options])
    assert "output_dir:" in capsys.readouterr().err
