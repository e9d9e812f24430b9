"""A size whose exit weighs tokens as a small model: exact as ONNX, refused as a plain backbone."""

import numpy as np
import pytest
import torch
from test_export_clients import outputs_of

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.configuration_2dmse import POOLING_MODES
from modeling_2dmse.pooling import pool
from run_scripts.export import main, onnx_encoder

TEXTS = ["a man plays the guitar on a stage", "a", "two dogs run", "she is reading a book in the park by the sea"]
REFUSAL = (
    "format: transformers cannot hold the gate of exit 2, which weighs the tokens of a text; use onnx, all layers if "
    "their exit has no gate, or a model made with --exit_gates false"
)


@pytest.fixture
def model(tiny_model):
    """Gated below its last exit, as `twodmse elasticize` makes models."""
    model = tiny_model(projected=True, gated=True)
    model.exit_gates[-1].reset()
    return model


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_onnx_is_exact(pooling, tiny_model, tmp_path):
    model = tiny_model(projected=True, gated=True, pooling=pooling)
    model.export(tmp_path / "small", 2, 16, format="onnx", dtype="int8")
    expected = model.encode(TEXTS, 2, 16)
    without = tiny_model(projected=True, pooling=pooling).encode(TEXTS, 2, 16)
    assert (expected * without).sum(axis=1).min() < 0.9
    tokens, outputs = outputs_of(tmp_path / "small", TEXTS)
    np.testing.assert_allclose(outputs["sentence_embedding"], expected, atol=1e-5)
    states, mask = torch.from_numpy(outputs["last_hidden_state"]), torch.from_numpy(tokens["attention_mask"])
    taken = pooling if pooling == "weightedmean" else "mean"
    vectors = torch.nn.functional.normalize(pool(states, mask, taken))
    np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-5)
    assert (onnx_encoder(str(tmp_path / "small"))(TEXTS) * expected).sum(axis=1).min() > 0.97  # the int8 file
    readme = (tmp_path / "small" / "README.md").read_text()
    assert f"token states are weighed by a gate, pooled by `{taken}`, and vectors" in readme
    assert "`last_hidden_state` is weighed, projected and cut to 16 dimensions already" in readme


def test_a_plain_backbone_cannot_hold_a_gate(model, tmp_path, capsys):
    with pytest.raises(ValueError, match=REFUSAL):
        model.export(tmp_path / "new" / "small", 2, 16)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "new" / "small")]
    with pytest.raises(SystemExit, match="2"):
        main([*flags, "--num_layers", "2"])
    assert [line for line in capsys.readouterr().err.splitlines() if "format:" in line][-1].endswith(REFUSAL)
    assert not (tmp_path / "new").exists()


def test_a_neutral_gate_is_left_out(model, tmp_path):
    model.export(tmp_path / "full", dim=16)
    assert "weighed" not in (tmp_path / "full" / "README.md").read_text()
    again = TwoDMSEModel.from_backbone(tmp_path / "full")
    assert again.exit_gates is None
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS, dim=16), atol=1e-5)
