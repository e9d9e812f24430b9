"""elasticize.py with gates: which encoders get them, what is saved, and what stays a plain encoder."""

import json

import pytest
import torch
from conftest import SENTENCES
from sentence_transformers import SentenceTransformer
from test_elasticize import TEXTS, start, weights  # noqa: F401 (start is a fixture)

from modeling_2dmse import TwoDMSEModel
from run_scripts.comparing import label_free


@pytest.mark.parametrize("effort", ["fit", "short"])
def test_every_exit_below_the_last_one_gets_a_gate(effort, start, backbone_path):  # noqa: F811
    folder = start.run(effort=effort)
    model = TwoDMSEModel.from_pretrained(folder)
    found = [not gate.is_neutral for gate in model.exit_gates]
    assert found == [True, True, False, False], "of 1x8 and 2x16, not of 4x32"
    if effort == "fit":
        plain = TwoDMSEModel.from_backbone(backbone_path("bert")).encode(SENTENCES)
        fitted = model.encode(SENTENCES)
        assert fitted @ fitted.T == pytest.approx(plain @ plain.T, abs=1e-5)
    stock = SentenceTransformer(str(folder), trust_remote_code=True, model_kwargs={"num_layers": 1, "dim": 8})
    assert stock.encode(SENTENCES) == pytest.approx(model.encode(SENTENCES, num_layers=1, dim=8), abs=1e-5)
    card = (folder / "README.md").read_text()
    assert "- exit gates: `True`" in card


def test_training_changes_the_gates_but_the_last_one(start, tmp_path):  # noqa: F811
    fitted = weights(start.run(effort="fit", output_dir=tmp_path / "fit"))
    trained = weights(start.run(learning_rate=1e-2))
    assert not torch.equal(fitted["exit_gates.0.weight"], trained["exit_gates.0.weight"])
    assert not trained["exit_gates.3.weight"].any()


def test_the_full_size_is_exported_as_a_plain_encoder(start, tmp_path):  # noqa: F811
    model = TwoDMSEModel.from_pretrained(start.run(effort="short"))
    model.export(tmp_path / "full")
    assert SentenceTransformer(str(tmp_path / "full")).encode(SENTENCES) == pytest.approx(
        model.encode(SENTENCES), abs=1e-5
    )


def test_without_gates_every_exit_takes_the_plain_mean(start):  # noqa: F811
    model = TwoDMSEModel.from_pretrained(start.run(effort="fit", exit_gates="false"))
    assert model.exit_gates is None
    assert not any("gate" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("effort", ["fit", "short"])
def test_a_model_with_gates_is_made_one_without(effort, start, tmp_path):  # noqa: F811
    gated = start.run(effort="fit", output_dir=tmp_path / "gated")
    folder = start.run(model_name_or_path=gated, effort=effort, exit_gates="false")
    model = TwoDMSEModel.from_pretrained(folder)
    assert model.exit_gates is None
    assert "- exit gates: `False`" in (folder / "README.md").read_text()
    results = [json.loads((path / "results.json").read_text()) for path in (gated, folder)]
    assert results[1]["before"]["agreement"] == results[0]["agreement"], "it is measured as it was, with gates"
    model.export(tmp_path / "small", 1, 8)
    stock = SentenceTransformer(str(tmp_path / "small"))
    assert stock.encode(SENTENCES) == pytest.approx(model.encode(SENTENCES, num_layers=1, dim=8), abs=1e-5)


def test_a_gate_that_the_full_size_needs_stays(start, tmp_path, capsys):  # noqa: F811
    whole = TwoDMSEModel.from_pretrained(start.run(effort="fit", output_dir=tmp_path / "gated"))
    whole.truncate(2).save_pretrained(tmp_path / "cut")
    given = {"model_name_or_path": tmp_path / "cut", "sizes": ["1x8", "2x32"], "effort": "fit"}
    with pytest.raises(SystemExit, match="2"):
        start.run(**given, exit_gates="false")
    assert "exit_gates: false is not allowed for" in capsys.readouterr().err
    model = TwoDMSEModel.from_pretrained(start.run(**given))
    found, wanted = model.encode(SENTENCES), whole.encode(SENTENCES, num_layers=2)
    assert found @ found.T == pytest.approx(wanted @ wanted.T, abs=1e-5)


def test_a_ladder_of_all_layers_has_no_exit_to_weigh(start):  # noqa: F811
    folder = start.run(effort="fit", sizes=["4x8", "4x32"])
    assert TwoDMSEModel.from_pretrained(folder).exit_gates is None
    assert "- exit gates: `False`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("effort", ["fit", "short"])
def test_an_encoder_that_takes_one_token_keeps_it_at_full_size(effort, start, backbone_path):  # noqa: F811
    folder = start.run(effort=effort, pooling="cls", per_device_train_batch_size=16)
    model = TwoDMSEModel.from_pretrained(folder)
    assert model.config.exit_poolings == ["mean", "mean", "mean", "cls"]
    assert [gate.is_neutral for gate in model.exit_gates] == [False, False, True, True], "of 1x8 and 2x16"
    assert "- Pooling: cls; mean below the last exit" in (folder / "README.md").read_text()
    expected = model.encode(SENTENCES) @ model.encode(SENTENCES).T
    if effort == "fit":
        plain = TwoDMSEModel.from_backbone(backbone_path("bert"), pooling="cls").encode(SENTENCES)
        assert expected == pytest.approx(plain @ plain.T, abs=1e-5)


def test_an_encoder_that_takes_one_token_is_exported_without_gates(start, tmp_path):  # noqa: F811
    folder = start.run(effort="fit", pooling="cls", exit_gates="false")
    model = TwoDMSEModel.from_pretrained(folder)
    assert model.config.exit_poolings == ["mean", "mean", "mean", "cls"]
    for n, dim in ((1, 8), (4, 32)):
        model.export(tmp_path / f"small{n}", n, dim)
        stock = SentenceTransformer(str(tmp_path / f"small{n}"))
        assert stock.encode(SENTENCES) == pytest.approx(model.encode(SENTENCES, n, dim), abs=1e-5)
        again = TwoDMSEModel.from_backbone(tmp_path / f"small{n}")
        assert (again.config.pooling, again.config.exit_poolings) == ("mean" if n == 1 else "cls", None)


def test_gates_are_fitted_to_another_teacher_too(start, backbone_path, tmp_path):  # noqa: F811
    TwoDMSEModel.from_backbone(backbone_path("distilbert")).save_pretrained(tmp_path / "teacher")
    folder = start.run(effort="fit", teacher_model_name_or_path=tmp_path / "teacher")
    assert not TwoDMSEModel.from_pretrained(folder).exit_gates[0].is_neutral


def test_separate_models_have_the_gate_of_their_exit(start, tmp_path):  # noqa: F811
    words = start.words(per_device_train_batch_size=16, sizes=["1x8", "4x32"])
    label_free.main(["--methods", "separate", "--results_file", str(tmp_path / "found.json"), *words])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"untouched", "separate 1x8", "separate 4x32"} <= set(found)
    begun = TwoDMSEModel.from_pretrained(tmp_path / "out" / "start")
    assert not begun.exit_gates[0].is_neutral
