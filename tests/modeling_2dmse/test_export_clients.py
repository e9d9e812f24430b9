"""What stock clients find in an exported folder: the layout, the outputs and axes of the ONNX file, and a README.md."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import LADDER, SENTENCES

from modeling_2dmse import TwoDMSEModel
from run_scripts import export
from run_scripts.shared import checks

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [*SENTENCES[:6], " ".join(SENTENCES)]  # the last is longer than the 48 tokens that the tokenizer keeps


@pytest.fixture(scope="module")
def elastic(backbone_path, tmp_path_factory):
    """An elastic model with projections whose folder has a card that names a licence."""
    model = TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=LADDER, prompts={"query": "the cat "})
    model.add_exit_projections()
    for index, projection in enumerate(model.exit_projections):
        projection.weight.data.roll(index + 1, 0).mul_(2.0)
        projection.weight.data[0] = projection.weight.data[0].flip(0)
    folder = tmp_path_factory.mktemp("elastic") / "my-model"
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\n# my-model\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TwoDMSEModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def onnx_folder(elastic, tmp_path_factory):
    return Path(elastic.export(tmp_path_factory.mktemp("exported") / "small", 2, 8, format="onnx", dtype="int8"))


def outputs_of(folder: Path, texts: list[str], name: str = "model.onnx") -> tuple[dict, dict[str, np.ndarray]]:
    """What onnxruntime gives for everything that the tokenizer returns."""
    import onnxruntime
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / "onnx" / name), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    return tokens, dict(zip(names, session.run(None, dict(tokens)), strict=True))


def test_the_onnx_folder_has_what_clients_look_for(elastic, onnx_folder):
    import onnxruntime

    files = {str(path.relative_to(onnx_folder)) for path in onnx_folder.rglob("*") if path.is_file()}
    assert {"config.json", "onnx/model.onnx", "onnx/model_quantized.onnx", "tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
            "config_sentence_transformers.json", "README.md"} <= files  # fmt: skip
    for name in ("model.onnx", "model_quantized.onnx"):
        session = onnxruntime.InferenceSession(str(onnx_folder / "onnx" / name), providers=["CPUExecutionProvider"])
        axes = ["batch_size", "sequence_length"]
        inputs = {entry.name: entry.shape for entry in session.get_inputs()}
        assert inputs == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), axes)
        shapes = [(entry.name, entry.shape) for entry in session.get_outputs()]
        assert shapes == [("last_hidden_state", [*axes, 8]), ("sentence_embedding", [axes[0], 8])]
    config = json.loads((onnx_folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["architectures"]) == ("bert", 2, ["BertModel"])
    assert "auto_map" not in config
    settings = json.loads((onnx_folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == elastic.config.prompts
    assert json.loads((onnx_folder / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 8


def test_commands_refuse_an_onnx_folder_as_a_model(onnx_folder):
    with pytest.raises(ValueError, match="small is an ONNX export; use the model that it was cut out of"):
        checks.check_model(str(onnx_folder))


@pytest.mark.parametrize("pooling", ["mean", "weightedmean"])
def test_both_outputs_of_the_onnx_file_give_the_vectors(pooling, elastic, onnx_folder, tmp_path, monkeypatch):
    if pooling != "mean":
        monkeypatch.setattr(elastic.config, "pooling", pooling)
        onnx_folder = Path(elastic.export(tmp_path / "other", 2, 8, format="onnx"))
    expected = elastic.encode(TEXTS, num_layers=2, dim=8)
    tokens, outputs = outputs_of(onnx_folder, TEXTS)
    assert np.allclose(outputs["sentence_embedding"], expected, atol=1e-5)
    weights = tokens["attention_mask"]
    if pooling == "weightedmean":
        weights = weights * weights.cumsum(axis=1)
    pooled = (outputs["last_hidden_state"] * weights[..., None]).sum(axis=1)
    assert np.allclose(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), expected, atol=1e-5)


def test_token_types_are_used(elastic, onnx_folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_folder / "onnx" / "model.onnx"))
    ids = np.arange(12).reshape(2, 6) + 5
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    plain = session.run(["sentence_embedding"], tokens)[0]
    assert np.abs(session.run(["sentence_embedding"], tokens | {"token_type_ids": 1 + 0 * ids})[0] - plain).max() > 1e-3


def test_saved_tokenizers_are_limited_in_every_file(elastic, onnx_folder, tmp_path):
    """tokenizer_config.json repeats the truncation of the file that the tokenizer was read from."""
    source = tmp_path / "source"
    elastic.save_pretrained(source)
    state = json.loads((source / "tokenizer.json").read_text())
    state["truncation"]["max_length"] = 5
    (source / "tokenizer.json").write_text(json.dumps(state))
    again = TwoDMSEModel.from_pretrained(source)
    again.save_pretrained(tmp_path / "saved")
    for folder in (onnx_folder, tmp_path / "saved", again.export(tmp_path / "plain", 1)):
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
        assert (settings["model_max_length"], settings.get("max_length", 48)) == (48, 48)
        assert json.loads((Path(folder) / "tokenizer.json").read_text())["truncation"]["max_length"] == 48


def test_exports_have_a_readme_and_files_that_all_can_read(elastic, onnx_folder, tmp_path, capsys):
    rows = ["sentence1,sentence2,score", *(f"{SENTENCES[i]},{SENTENCES[i + 1]},{i % 5}" for i in range(10))]
    (tmp_path / "sts.csv").write_text("\n".join(rows) + "\n")
    model = ["--model_name_or_path", elastic.config.name_or_path, "--num_layers", "2", "--dim", "8"]
    export.main([*model, "--sts_files", str(tmp_path / "sts.csv"), "--output_dir", str(tmp_path / "small")])
    score = capsys.readouterr().out.partition("Spearman ")[2].partition(",")[0]
    mode = (tmp_path / "sts.csv").stat().st_mode
    texts = {}
    for folder in (tmp_path / "small", onnx_folder):
        assert {path.stat().st_mode for path in folder.rglob("*") if path.is_file()} == {mode}
        text = texts[folder] = (folder / "README.md").read_text()
        assert text.startswith("---\nlicense: apache-2.0\n")
        for part in ("# small", "size 2x8", "48 tokens", "cut out of my-model", "have unit length", "pooled by `mean`",
                     f"transformers {transformers.__version__}", f"torch {torch.__version__}"):  # fmt: skip
            assert part in text
        for part in ('SentenceTransformer("small"', "apache-2.0, as my-model states", "- `query`: 'the cat '"):
            assert part in text
        assert str(tmp_path.parent) not in text
    plain, onnx = texts.values()
    assert f"| sts | {score} | {score} |" in plain
    assert "have 32 dimensions instead of 8; without the projection" in plain
    assert 'backend="onnx"' in onnx
    assert "InferenceSession" in onnx
    assert '{ dtype: "q8" }' in onnx
    assert "Scores" not in onnx


def test_the_default_prompt_is_named_and_scores_are_those_of_one_text(tiny_model, tmp_path, capsys):
    model = tiny_model(prompts={"query": "the cat sleeps ", "document": ""})
    model.config.default_prompt_name = "query"
    model.save_pretrained(tmp_path / "model")
    rows = ["sentence1,sentence2,score", *(f"{SENTENCES[i]},{SENTENCES[i + 1]},{i % 5}" for i in range(10))]
    (tmp_path / "sts.csv").write_text("\n".join(rows) + "\n")
    flags = ["--num_layers", "2", "--dim", "8", "--sts_files", str(tmp_path / "sts.csv")]
    export.main(["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "small"), *flags])
    assert "(+0.0000)" in capsys.readouterr().out
    text = (tmp_path / "small" / "README.md").read_text()
    assert "have to put them before the texts):\n\n- `query`: 'the cat sleeps ' (the default)\n\n" in text


def test_the_readme_of_an_unnamed_licence_and_an_uncut_width(tiny_model, tmp_path):
    model = tiny_model()
    model.config.similarity = "dot"
    text = Path(model.export(tmp_path / "small", 1), "README.md").read_text()
    assert "license:" not in text
    assert "states none" in text
    assert "compared by dot product" in text
    assert "get the same vectors if they are set to pool by `mean`" in text


def test_transformers_js(elastic, onnx_folder, tmp_path):
    """Installed by .ci/run; elsewhere with `npm install --prefix out/js @huggingface/transformers`."""
    node, modules = shutil.which("node"), ROOT / "out" / "js" / "node_modules"
    if node is None:
        pytest.skip("no node")
    if not (modules / "@huggingface" / "transformers").is_dir():
        pytest.skip("no transformers.js; npm install --prefix out/js --ignore-scripts @huggingface/transformers")
    script = tmp_path / "embed.mjs"
    shutil.copy(ROOT / "examples" / "clients" / "transformers_js.mjs", script)
    (tmp_path / "node_modules").symlink_to(modules)
    done = subprocess.run(
        [node, str(script), str(onnx_folder), *TEXTS[:6]], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got, expected = json.loads(done.stdout), elastic.encode(TEXTS[:6], num_layers=2, dim=8)
    assert set(got) == {"AutoModel", "pipeline"}
    for vectors in got.values():
        assert np.allclose(np.array(vectors), expected, atol=1e-5)
