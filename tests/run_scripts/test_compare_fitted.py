"""compare.py: the methods that fit exits, separate models with the best recipe, search, and what was tried."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from test_compare import LADDER, flags, folder, make_budget  # noqa: F401

from modeling_2dmse import TwoDMSEModel
from run_scripts import compare
from run_scripts.comparing import fitting, methods
from run_scripts.comparing.report import tried, tried_table
from trainer import TwoDMSETrainer
from trainer.alignment import score_kl

FITTED = ("projections", "projections-refined", "projections-gates", "pca", "separate-same-recipe")


@pytest.fixture
def beir(folder):  # noqa: F811
    (folder / "mini" / "qrels").mkdir(parents=True)
    documents = [json.dumps({"_id": f"d{i}", "title": "", "text": text}) for i, text in enumerate(SENTENCES)]
    (folder / "mini" / "corpus.jsonl").write_text("\n".join(documents))
    queries = [json.dumps({"_id": f"q{i}", "text": SENTENCES[i + 1]}) for i in range(6)]
    (folder / "mini" / "queries.jsonl").write_text("\n".join(queries))
    judged = [f"q{i}\td{i}\t1" for i in range(6)]
    (folder / "mini" / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    return folder


def test_two_runs_with_one_seed_give_the_same_digits_and_tell_what_was_tried(beir, capsys):
    named = flags("--methods", *FITTED, "--seeds", "0", "--beir_dirs", "mini")
    found = []
    for name in ("first", "second"):
        compare.main([*named, "--output_dir", name, "--results_file", f"{name}.json"])
        content = json.loads((beir / f"{name}.json").read_text())
        rows = sorted(content["rows"], key=lambda row: (row["method"], row.get("size", "")))
        digits = json.dumps([[row["scores"], row["retrieval"]] for row in rows])
        found.append(json.dumps(json.loads(digits, parse_float=lambda text: f"{float(text):.4f}")))
    assert found[0] == found[1]
    assert [row["retrieval"]["mini"].keys() for row in rows] == [*[{*LADDER}] * 4, {"1x8"}, {"4x32"}]

    entries = {(entry["method"], entry.get("size")): entry for entry in content["tried"]}
    assert {key: entry["settings"] for key, entry in entries.items()} == {
        ("projections", None): 0, ("projections-refined", None): 0, ("projections-gates", None): 0, ("pca", None): 0,
        ("separate-same-recipe", "1x8"): 2, ("separate-same-recipe", "4x32"): 2,
    }  # fmt: skip
    for (_, size), entry in entries.items():
        rates = entry["rates"]
        assert entry["chosen"] == (float(max(rates, key=rates.get)) if size else None)
    text = (beir / "second-nli.md").read_text()
    assert text in capsys.readouterr().out
    assert "nDCG@10 x 100, mean over mini" in text
    assert "| separate-same-recipe 1x8 | 2 | 0.01: " in text


def test_what_was_tried_is_told_for_each_model():
    search = [
        {"train": "nli", "method": "separate", "size": "1x8", "learning_rate": rate, "scores": {"dev": {"1x8": score}}}
        for rate, score in ((2e-4, 0.5), (1e-4, 0.25))
    ]
    rows = [{"train": "nli", "method": "separate", "size": "1x8", "learning_rate": 2e-4}]
    rows += [{"train": "nli", "method": "pca", "learning_rate": None}, rows[0] | {"train": "stsb"}]
    entries = tried(search, rows, "nli")
    assert [entry["method"] for entry in entries] == ["pca", "separate"]
    assert entries[1] == {
        "method": "separate", "size": "1x8", "settings": 2, "rates": {"0.0001": 0.25, "0.0002": 0.5}, "chosen": 2e-4
    }  # fmt: skip
    assert tried_table(entries).splitlines()[-1] == "| separate 1x8 | 2 | 0.0001: 25.00, 0.0002: 50.00 | 0.0002 |"


def test_projections_are_those_that_best_starts_from(folder, monkeypatch):  # noqa: F811
    """The fit of the method, of the start of separate models, and of the trainer before its first step are the same."""
    kept = {}

    def remember(trainer):
        fit(trainer)
        kept["best"] = [projection.weight.clone() for projection in trainer.encoder.exit_projections]

    fit = TwoDMSETrainer._before_training
    monkeypatch.setattr(TwoDMSETrainer, "_before_training", remember)
    compare.main(flags("--methods", "best", "projections", "--seeds", "0", "--learning_rates", "1e-2"))
    fitting.write_start(0, make_budget(), "start")
    for path in ("out/nli/projections-0", "start"):
        saved = TwoDMSEModel.from_pretrained(path)
        for mine, theirs in zip(saved.exit_projections, kept["best"], strict=True):
            torch.testing.assert_close(mine.weight, theirs)
    assert not torch.allclose(kept["best"][0], torch.eye(32), atol=0.1)


def test_a_separate_model_has_the_start_as_its_teacher(folder, monkeypatch):  # noqa: F811
    seen = {}

    class Watched(TwoDMSETrainer):
        def __init__(self, *args, teacher_embeddings, **kwargs):
            super().__init__(*args, teacher_embeddings=teacher_embeddings, **kwargs)
            seen.update(teacher=teacher_embeddings, plan=self.training_objective.plan(random.Random(0)))

    monkeypatch.setattr(fitting, "TwoDMSETrainer", Watched)
    budget = dataclasses.replace(make_budget(), unlabeled_file="plain.txt")
    fitting.write_start(0, budget, "start")
    unit = methods.Unit(methods.SAME_RECIPE, "1x8")
    fitting.train_same_recipe(unit, 1e-2, 0, budget, "small", "start")
    start = TwoDMSEModel.from_pretrained("start")
    found = seen["teacher"](seen["teacher"].texts[:5])
    expected = start.encode(seen["teacher"].texts[:5], num_layers=4, dim=32)
    assert np.allclose(found, expected, atol=1e-5)
    (alignment,) = seen["plan"].alignments
    assert (alignment.kind, str(alignment.student), str(alignment.teacher), alignment.weight) == (
        "score_kl", "1x8", "1x32", 3
    )  # fmt: skip
    assert seen["plan"].unlabeled == (alignment._replace(weight=1.0),)
    small = TwoDMSEModel.from_pretrained("small")
    assert (small.num_layers, small.config.dim) == (1, 8)
    moved = (small.exit_projections[0].weight - start.exit_projections[0].weight).abs().max()
    assert 0 < moved < 0.1, "it starts from the projection that is fitted to the full size"


def test_a_separate_model_has_no_teacher_if_that_of_best_is_the_largest_size(folder):  # noqa: F811
    recipe = (folder / "best.yaml").read_text().replace("teacher: start", "teacher: largest\ninitial_share: 0.6")
    (folder / "best.yaml").write_text(recipe)
    fitting.write_start(0, make_budget(), "start")
    fitting.train_same_recipe(methods.Unit(methods.SAME_RECIPE, "4x32"), 1e-2, 0, make_budget(), "small", "start")
    card = (folder / "small" / "README.md").read_text()
    assert "initial share" in card
    assert "| teacher |" not in card
    small, start = (TwoDMSEModel.from_pretrained(name) for name in ("small", "start"))
    assert not torch.equal(small.exit_projections[3].weight, start.exit_projections[3].weight)


def test_gates_of_separate_models_without_a_teacher_are_fitted_first_and_trained(folder):  # noqa: F811
    recipe = (folder / "best.yaml").read_text().replace("teacher: start", "teacher: largest\nexit_gates: true")
    (folder / "best.yaml").write_text(recipe + "\nrefine_projections: true\n")
    fitting.write_start(0, make_budget(), "start")
    start = TwoDMSEModel.from_pretrained("start")
    assert [gate.is_neutral for gate in start.exit_gates][0::3] == [False, True]
    for size, place in (("1x8", 0), ("4x32", 3)):
        fitting.train_same_recipe(methods.Unit(methods.SAME_RECIPE, size), 1e-2, 0, make_budget(), size, "start")
        small = TwoDMSEModel.from_pretrained(size)
        assert len(small.exit_gates) == place + 1
        assert small.exit_gates[place].is_neutral == (size == "4x32")
        assert torch.equal(small.exit_gates[place].weight, start.exit_gates[place].weight) == (size == "4x32")


def test_separate_models_are_refined_as_the_exits_of_best_are(folder):  # noqa: F811
    budget = make_budget()
    fitting.write_start(0, budget, "start")
    found = {}
    for refined in (False, True):
        recipe = (folder / "best.yaml").read_text() + f"\nrefine_projections: {str(refined).lower()}\n"
        (folder / "refining.yaml").write_text(recipe)
        changed = dataclasses.replace(budget, best_recipe="refining.yaml")
        for size in ("1x8", "4x32"):
            target = f"{size}-{refined}"
            fitting.train_same_recipe(methods.Unit(methods.SAME_RECIPE, size), 1e-2, 0, changed, target, "start")
            found[target] = TwoDMSEModel.from_pretrained(target)
    assert torch.equal(found["4x32-True"].exit_projections[3].weight, found["4x32-False"].exit_projections[3].weight)
    start = torch.from_numpy(TwoDMSEModel.from_pretrained("start").encode(SENTENCES))
    plain, refined = (
        score_kl(torch.from_numpy(found[f"1x8-{name}"].encode(SENTENCES)), start, 20.0) for name in (False, True)
    )
    assert refined < 0.9 * plain


def test_gates_of_best_are_given_to_separate_models_after_training(folder):  # noqa: F811
    (folder / "best.yaml").write_text((folder / "best.yaml").read_text() + "\nexit_gates: true\n")
    fitting.fit(methods.GATES, "recipe.yaml", 0, make_budget(), "fitted")
    fitting.write_start(0, make_budget(), "start")
    fitted, start = (TwoDMSEModel.from_pretrained(name) for name in ("fitted", "start"))
    assert [gate.is_neutral for gate in fitted.exit_gates][0::3] == [False, True]
    assert start.exit_gates is None
    wanted = torch.from_numpy(start.encode(SENTENCES))
    for size, gated in (("1x8", True), ("3x16", True), ("4x32", False)):
        found = {}
        for gates in ("true", "false"):
            (folder / "trained.yaml").write_text((folder / "best.yaml").read_text() + f"\nexit_gates: {gates}\n")
            budget, target = dataclasses.replace(make_budget(), best_recipe="trained.yaml"), f"{size}-{gates}"
            fitting.train_same_recipe(methods.Unit(methods.SAME_RECIPE, size), 1e-2, 0, budget, target, "start")
            found[gates] = TwoDMSEModel.from_pretrained(target)
        assert (found["true"].exit_gates is not None) == gated
        far, near = (
            score_kl(torch.from_numpy(found[name].encode(SENTENCES)), wanted, 20.0) for name in ("false", "true")
        )
        assert near < 0.95 * far if gated else near == far


def test_pca_is_that_of_each_exit(tiny_model):
    model = tiny_model().eval()
    states = model.encode_states(SENTENCES).double()
    fitting.fit_principal_components(model, SENTENCES, show_progress_bar=False)
    after = model.encode_states(SENTENCES).double()
    for before, found in zip(states, after, strict=True):
        directions = np.linalg.svd((before - before.mean(dim=0)).numpy(), full_matrices=False)[2]
        expected = before.numpy() @ directions.T
        for column in range(4):
            sign = np.sign(expected[:, column] @ found[:, column].numpy())
            assert np.allclose(sign * expected[:, column], found[:, column], atol=1e-3)


def test_one_peer_trains_every_layer_and_dim(folder, monkeypatch):  # noqa: F811
    from sentence_transformers.sentence_transformer import losses

    given, theirs = [], losses.Matryoshka2dLoss
    monkeypatch.setattr(losses, "Matryoshka2dLoss", lambda *a, **kw: given.append(kw) or theirs(*a, **kw))
    both = (methods.PEER, methods.PEER_ALL)
    compare.main(flags("--methods", *both, "--seeds", "0", "--learning_rates", "1e-2"))
    assert given == [{}, {"n_layers_per_step": -1, "n_dims_per_step": -1}]
