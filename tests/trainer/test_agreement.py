"""Agreement of sizes with a reference: equal to plain loops, and 1 for the untouched full size."""

import numpy as np
import pytest
import torch
from conftest import LADDER, SENTENCES
from scipy.stats import spearmanr

from modeling_2dmse import parse_ladder
from trainer import agreement as module
from trainer.agreement import agreement, reference_similarities
from trainer.projections import fit_exit_projections

SIZES = parse_ladder(LADDER, 4, 32)
TEXTS = [f"{a} {b}" for a in SENTENCES for b in SENTENCES[:2]]


def similarities(model, size, texts) -> np.ndarray:
    vectors = model.encode(texts, size.num_layers, size.dim).astype(np.float64)
    return vectors @ vectors.T


def nearest(row: np.ndarray, own: int, count: int) -> set[int]:
    return set(sorted((n for n in range(len(row)) if n != own), key=lambda n: -row[n])[:count])


@pytest.mark.parametrize(("texts", "count"), [(TEXTS, 10), (SENTENCES[:12], 5), (SENTENCES[:3], 1)])
def test_equal_to_plain_loops(texts, count, tiny_model):
    model, start = tiny_model(), tiny_model("bert", projected=True)
    with torch.no_grad():  # so that the full sizes of the two differ
        start.exit_projections[3].weight.mul_(torch.linspace(0.1, 3, 32))
    found = agreement(model, texts, SIZES, reference_similarities(start, texts))
    wanted = similarities(start, SIZES[-1], texts)
    assert found["n"] == len(texts)
    for size in SIZES:
        mine = similarities(model, size, texts)
        shared = [len(nearest(mine[i], i, count) & nearest(wanted[i], i, count)) / count for i in range(len(texts))]
        pairs = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts))]
        expected = spearmanr([mine[p] for p in pairs], [wanted[p] for p in pairs]).statistic
        assert found["overlap@10"][str(size)] == pytest.approx(np.mean(shared), abs=1e-6)
        assert found["spearman"][str(size)] == pytest.approx(expected, abs=1e-5)
    assert len(texts) == 3 or found["spearman"]["4x32"] < 0.999
    assert set(found["overlap@10"]) == set(LADDER)


@pytest.mark.parametrize("default", [None, "document"])
def test_the_untouched_full_size_agrees_wholly(default, tiny_model):
    model = tiny_model()
    if default is not None:
        model.config.prompts, model.config.default_prompt_name = {default: "the road is wet the road "}, default
    reference = reference_similarities(model, TEXTS)
    before = agreement(model, TEXTS, SIZES, reference)
    assert before["overlap@10"]["4x32"] == 1.0
    assert before["spearman"]["4x32"] == 1.0
    assert before["spearman"]["1x8"] < 0.9
    fit_exit_projections(model, TEXTS)
    after = agreement(model, TEXTS, SIZES, reference)
    assert after["spearman"]["4x32"] == pytest.approx(1.0, abs=1e-4)
    assert after["spearman"]["1x8"] > before["spearman"]["1x8"] + 0.05


def test_many_pairs_are_drawn_always_in_the_same_way(tiny_model, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", 50)
    rows, columns = module._pairs(40)
    assert len(rows) == len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 50
    assert (rows < columns).all()
    assert torch.equal(module._pairs(40)[0], rows)


def test_equal_texts_give_no_correlation(tiny_model):
    model = tiny_model()
    texts = [SENTENCES[0]] * 4
    found = agreement(model, texts, SIZES, torch.ones(4, 4))
    assert set(found["spearman"].values()) == {0.0}
