"""The sizes of a step at once: the same values and gradients as one after another, in few kernels."""

import random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from modeling_2dmse import parse_ladder
from trainer import step_loss
from trainer.losses import Rows
from trainer.objectives import Objective

N, H = 6, 32
LADDER = parse_ladder(["1x4", "2x8", "3x12", "4x16", "5x24", "6x32"])
generator = torch.Generator().manual_seed(0)
STATES = torch.randn(N, 29, H, generator=generator)
START = torch.randn(29, H, generator=generator)
TRIPLETS = Rows((8, 8, 6), unlabeled=7)
PAIRS = Rows((11, 11), scores=torch.rand(11, generator=generator), unlabeled=7)


def gradient(spec: Objective, rows: Rows, loss: str, monkeypatch, at_once: bool, start=None):
    monkeypatch.setattr(step_loss, "fits_stacked", lambda *_: at_once)
    plan = spec.plan(random.Random(1))
    states = STATES[[n - 1 for n in plan.layers]]
    return step_loss.plan_gradient(plan, states, rows, loss, start=start)


@pytest.mark.parametrize("loss", ["infonce", "cosent", "angle", "cosine_mse"])
@pytest.mark.parametrize("name", ["starbucks", "2dmse", "matryoshka", "espresso"])
@pytest.mark.parametrize("alignment", ["score_kl", "feature_kl", "none"])
def test_at_once_equals_one_after_another(name, alignment, loss, monkeypatch):
    rows = TRIPLETS if loss == "infonce" else PAIRS
    weight = 0.0 if alignment == "none" else 0.7
    spec = Objective(name, LADDER, N, H, alignment=alignment, unlabeled_weight=weight, cross_size_weight=0.3)
    count = sum(rows.counts) + rows.unlabeled
    monkeypatch.setattr(f"{__name__}.STATES", STATES[:, :count])
    total, parts, slopes = gradient(spec, rows, loss, monkeypatch, at_once=True)
    expected, expected_parts, expected_slopes = gradient(spec, rows, loss, monkeypatch, at_once=False)
    assert set(parts) == set(expected_parts)
    assert expected_slopes.abs().max() > 1e-3
    torch.testing.assert_close(total, expected)
    for part, value in expected_parts.items():
        torch.testing.assert_close(parts[part], value, msg=part)
    torch.testing.assert_close(slopes, expected_slopes, atol=1e-6, rtol=1e-4)


def test_at_once_with_the_start_as_teacher(monkeypatch):
    spec = Objective("starbucks", LADDER, N, H, teacher="start", alignment_weight=3.0, unlabeled_weight=0.5)
    sides = [gradient(spec, TRIPLETS, "infonce", monkeypatch, at_once, START) for at_once in (True, False)]
    torch.testing.assert_close(sides[0][0], sides[1][0])
    torch.testing.assert_close(sides[0][2], sides[1][2], atol=1e-6, rtol=1e-4)


def test_a_large_batch_is_computed_size_by_size():
    spec = Objective("starbucks", LADDER, N, H).plan(random.Random(0))
    assert step_loss.fits_stacked(spec, Rows((64, 64, 64)), torch.device("cpu"))
    assert not step_loss.fits_stacked(spec, Rows((2048, 2048, 2048)), torch.device("cuda"))


def test_six_sizes_launch_hardly_more_operators_than_one():
    """`step.launches`: operators of loss and alignment, forward and backward, of six sizes over those of one."""

    def launches(chosen: slice) -> int:
        plan = Objective("starbucks", LADDER, N, H, teacher="start").plan(random.Random(0))
        plan = plan._replace(terms=plan.terms[chosen], alignments=plan.alignments[chosen])
        states = STATES[[n - 1 for n in plan.layers]]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            _, parts, _ = step_loss.plan_gradient(plan, states, TRIPLETS, "infonce", start=START)
        assert len(parts) == 2 * len(plan.terms)
        # Operators that only change the shape launch nothing.
        views = ("view", "t", "transpose", "expand", "slice", "as_strided", "unbind", "select", "detach", "diagonal")
        names = [e.name.removeprefix("aten::") for e in profiler.events() if e.name.startswith("aten::")]
        return sum(name not in views for name in names)

    one, six = launches(slice(2, 3)), launches(slice(None))
    assert one > 20
    assert six <= 1.5 * one


@pytest.mark.parametrize("teacher", ["largest", "embeddings"])
def test_the_distance_to_the_teachers_embedding_is_one_minus_the_cosine_at_each_size(teacher, monkeypatch):
    spec = Objective("starbucks", LADDER, N, H, teacher=teacher, alignment_weight=3.0, embedding_weight=0.4)
    start = START if teacher == "embeddings" else None
    sides = [gradient(spec, TRIPLETS, "infonce", monkeypatch, at_once, start) for at_once in (True, False)]
    torch.testing.assert_close(sides[0][0], sides[1][0])
    torch.testing.assert_close(sides[0][2], sides[1][2], atol=1e-6, rtol=1e-4)
    target = (START if teacher == "embeddings" else STATES[-1]).double()
    students = LADDER if teacher == "embeddings" else LADDER[:-1]
    assert [name for name in sides[0][1] if name.startswith("embedding/")] == [f"embedding/{s}" for s in students]
    for size in students:
        cosines = []
        for row in range(22):  # the rows without labels have no target
            a, b = STATES[size.num_layers - 1][row, : size.dim].double().tolist(), target[row, : size.dim].tolist()
            length = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
            cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / length)
        expected = 1 - sum(cosines) / len(cosines)
        for _, parts, _ in sides:
            assert parts[f"embedding/{size}"].item() == pytest.approx(expected, abs=1e-5)
    plain = spec.__class__(**{**spec.__dict__, "embedding_weight": 0.0})
    total = gradient(plain, TRIPLETS, "infonce", monkeypatch, True, start)[0]
    share = sum(sides[0][1][f"embedding/{size}"] for size in students)
    torch.testing.assert_close(sides[0][0] - total, 0.4 * share, atol=1e-4, rtol=1e-4)
