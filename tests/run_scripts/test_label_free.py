"""label_free.py: what elasticize.py is compared with, from the same texts."""

import json
import signal

import numpy as np
import pytest
from conftest import LADDER, Signal
from test_elasticize import start, write_beir  # noqa: F401

from run_scripts.comparing import label_free
from run_scripts.comparing.label_free import METHODS
from run_scripts.training import elasticizing


def test_each_method_is_scored_on_the_same_texts_and_kept(tmp_path, start, monkeypatch):  # noqa: F811
    write_beir(tmp_path / "beir")
    file = tmp_path / "baselines.json"
    flags = {"corpus_file": tmp_path / "beir", "beir_dirs": tmp_path / "beir", "results_file": file}
    label_free.main(start.words(**flags, num_train_epochs=1, shallow_steps=0.0))
    found = json.loads(file.read_text())
    scores = {name: result["retrieval"]["beir"]["ndcg@10"] for name, result in found.items()}
    assert set(scores) == {"untouched", "pca", "projections", "projections-refined", *(f"separate {s}" for s in LADDER)}
    full = LADDER[-1]
    for name in ("pca", "projections", "projections-refined"):
        assert set(scores[name]) == set(LADDER)
        assert scores[name][full] == pytest.approx(scores["untouched"][full])  # only turned
    for size in LADDER:
        assert set(scores[f"separate {size}"]) == {size}
    small = [np.round(scores[name][LADDER[0]], 12) for name in ("untouched", "pca", "projections")]
    assert len(set(small)) > 1

    embedded = []
    compute = elasticizing.compute_teacher_embeddings
    record = lambda *given, **more: embedded.append(given) or compute(*given, **more)
    monkeypatch.setattr(elasticizing, "compute_teacher_embeddings", record)
    alone = tmp_path / "alone.json"
    label_free.main(start.words(**flags | {"results_file": alone, "methods": "projections", "overwrite": "true"}))
    for name in ("untouched", "projections"):
        assert json.loads(alone.read_text())[name]["retrieval"] == found[name]["retrieval"], "PCA leaves no trace"
    assert not embedded, "the vectors of the pairs are for what is trained"

    monkeypatch.setattr(label_free.Baselines, "_write", lambda self, name, result: found.pop(name, None))
    for name in ("_pca", "_refined", "_separate"):
        monkeypatch.setattr(label_free.Baselines, name, lambda *given: pytest.fail("run again"))
    label_free.main(start.words(**flags, num_train_epochs=1, shallow_steps=0.0, overwrite="true"))
    assert not embedded, "each size was trained before"


def test_a_model_whose_training_is_stopped_has_no_score(tmp_path, start, monkeypatch):  # noqa: F811
    write_beir(tmp_path / "beir")

    class Stopped(label_free.TwoDMSETrainer):
        def __init__(self, **given):
            super().__init__(**given, callbacks=[Signal(signal.SIGINT)])

    monkeypatch.setattr(label_free, "TwoDMSETrainer", Stopped)
    file = tmp_path / "baselines.json"
    flags = {"corpus_file": tmp_path / "beir", "results_file": file, "methods": "separate"}
    with pytest.raises(KeyboardInterrupt):
        label_free.main(start.words(**flags, num_train_epochs=2, shallow_steps=0.0))
    assert not [name for name in json.loads(file.read_text()) if name.startswith("separate")]


def test_what_is_not_a_method_is_refused(start, capsys):  # noqa: F811
    for wrong, words in ({"methods": "mean"}, METHODS), ({"effort": "fit"}, ("effort: fit", "projections-refined")):
        with pytest.raises(SystemExit):
            label_free.main(start.words(results_file="b.json", **wrong))
        error = capsys.readouterr().err
        assert all(word in error for word in words)
