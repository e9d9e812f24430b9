"""Every objective, compared with a simple float64 reference that loops over its equation."""

import math
import random
from dataclasses import replace

import pytest
import torch

from modeling_2dmse import Size, parse_ladder
from trainer import step_loss
from trainer.alignment import pca_distance, score_kl
from trainer.choices import FEATURE_KL_FORMS
from trainer.losses import Rows, base_loss
from trainer.objectives import OBJECTIVES, Alignment, Objective, Term, geometric_dims
from trainer.step_loss import plan_loss

N, H = 4, 32
LADDER = parse_ladder(["1x8", "2x16", "4x32"])
STATES = torch.randn(N, 12, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRIPLETS = Rows((4, 4, 4))


def objective(name, **kwargs) -> Objective:
    return Objective(name, LADDER, N, H, **kwargs)


def compute(spec: Objective, rng=None, states=STATES, rows=TRIPLETS, loss="infonce"):
    plan = spec.plan(rng or random.Random(0))
    return plan_loss(plan, states[[n - 1 for n in plan.layers]], rows, loss)


def emb(n, d, states=STATES):
    return torch.nn.functional.normalize(states[n - 1].double()[:, :d], dim=-1)


def plain_feature_kl(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """KL(teacher || student) over the dimensions, mean over rows, one number at a time."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        shares = [[math.exp(x) / sum(math.exp(y) for y in side) for x in side] for side in (s, t)]
        total += sum(b * math.log(b / a) for a, b in zip(*shares, strict=True))
    return total / len(student)


def loss(n, d):
    return base_loss("infonce", emb(n, d), TRIPLETS).item()


@pytest.mark.parametrize("alignment", ["none", "feature_kl", "score_kl"])
def test_starbucks(alignment):
    expected = loss(1, 8) + loss(2, 16) + loss(4, 32)
    for n, d in ((1, 8), (2, 16)):
        if alignment == "feature_kl":
            expected += 0.3 * plain_feature_kl(STATES[n - 1, :, :d], STATES[3, :, :d])
        if alignment == "score_kl":
            expected += score_kl(emb(n, d), emb(4, 32)).item()
    total, parts = compute(objective("starbucks", alignment=alignment))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert parts["loss/2x16"].item() == pytest.approx(loss(2, 16), rel=1e-5)
    assert ("alignment/1x8" in parts) == (alignment != "none")
    assert "alignment/4x32" not in parts


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("form", FEATURE_KL_FORMS)
def test_forms_of_feature_kl(form, stacked, monkeypatch):
    """Starbucks' STS code, by default: softmax of raw states cut to d, teacher not detached; and the other forms."""
    monkeypatch.setattr(step_loss, "fits_stacked", lambda *_: stacked)
    spec = objective("starbucks", alignment="feature_kl", alignment_weight=1.0, feature_kl_form=form)
    plan = spec.plan(random.Random(0))._replace(terms=())
    states = STATES[[0, 1, 3]].clone().requires_grad_()
    total, parts = plan_loss(plan, states, TRIPLETS, "infonce")
    total.backward()
    sides = STATES.clone().requires_grad_()
    for n, d in ((1, 8), (2, 16)):
        student, teacher = sides[n - 1, :, :d], sides[3, :, :d]
        if form.startswith("normalized"):
            student, teacher = (side / side.norm(dim=1, keepdim=True) for side in (student, teacher))
        assert parts[f"alignment/{n}x{d}"].item() == pytest.approx(plain_feature_kl(student, teacher), abs=1e-6)
        p, q = torch.softmax(teacher.detach() if "detached" in form else teacher, 1), torch.softmax(student, 1)
        (p * (p.log() - q.log())).sum().div(12).backward()
    torch.testing.assert_close(states.grad, sides.grad[[0, 1, 3]], atol=1e-6, rtol=1e-4)
    assert (states.grad[2].abs().max() > 1e-4) == ("detached" not in form)


def test_the_raw_form_is_the_default_and_stronger_than_the_normalized_one():
    values = {}
    for form in (None, "raw", "normalized_detached"):
        kwargs = {} if form is None else {"feature_kl_form": form}
        _, parts = compute(objective("starbucks", alignment="feature_kl", **kwargs))
        values[form] = parts["alignment/1x8"].item()
    assert values[None] == values["raw"] > 2 * values["normalized_detached"]


def test_the_start_teaches_every_size_the_largest_included():
    start = torch.randn(12, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = torch.nn.functional.normalize(start, dim=-1)
    expected = loss(1, 8) + loss(2, 16) + loss(4, 32)
    expected += 3 * sum(score_kl(emb(n, d), teacher).item() for n, d in ((1, 8), (2, 16), (4, 32)))
    plan = objective("starbucks", teacher="start", alignment_weight=3.0).plan(random.Random(0))
    states = STATES[[n - 1 for n in plan.layers]].clone().requires_grad_()
    total, parts = plan_loss(plan, states, TRIPLETS, "infonce", start=start)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert parts["alignment/4x32"].item() == pytest.approx(score_kl(emb(4, 32), teacher).item(), rel=1e-5)
    assert parts["alignment/4x32"] > 0.01
    plan_loss(plan._replace(terms=()), states, TRIPLETS, "infonce", start=start)[0].backward()
    assert states.grad[-1].abs().max() > 1e-3, "the largest size learns from the start too"


def test_starbucks_aligns_scores_by_default():
    default, _ = compute(objective("starbucks"))
    assert default.item() == compute(objective("starbucks", alignment="score_kl"))[0].item()
    doubled, parts = compute(objective("starbucks", alignment_weight=2.0))
    aligned = sum(value for name, value in parts.items() if name.startswith("alignment"))
    assert doubled.item() == pytest.approx(default.item() + aligned.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_2dmse(seed):
    plan = objective("2dmse").plan(random.Random(seed))
    full, shallow, full_cut, shallow_cut = (term.size for term in plan.terms)
    k, d = shallow.num_layers, full_cut.dim
    assert (full, shallow, full_cut, shallow_cut) == (Size(N, H), Size(k, H), Size(N, d), Size(k, d))
    expected = loss(N, H) + loss(k, H) / k + loss(N, d) + loss(k, d) / k
    expected += math.log(2 + k) * plain_feature_kl(STATES[k - 1], STATES[N - 1])
    total, _ = compute(objective("2dmse"), random.Random(seed))
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_2dmse_draws_every_layer_but_the_last_and_every_geometric_dim(full):
    draws = [objective("2dmse", draw_full_dim=full).plan(random.Random(seed)).terms for seed in range(400)]
    layers = [terms[1].size.num_layers for terms in draws]
    dims = [terms[2].size.dim for terms in draws]
    assert set(layers) == {1, 2, 3}  # not the embedding output, and not the last layer
    assert set(dims) == ({8, 16, 32} if full else {8, 16})  # the released code's dims are below H
    for values, choices in ((layers, 3), (dims, len(set(dims)))):
        assert min(values.count(v) for v in set(values)) > 400 / choices * 0.75
    assert geometric_dims(768) == [8, 16, 32, 64, 128, 256, 512, 768]


def test_matryoshka():
    total, parts = compute(objective("matryoshka"))
    assert total.item() == pytest.approx(loss(N, 8) + loss(N, 16) + loss(N, 32), rel=1e-5)
    assert set(parts) == {"loss/4x8", "loss/4x16", "loss/4x32"}
    assert objective("matryoshka").plan(random.Random(0)).layers == (4,)
    aligned, _ = compute(objective("matryoshka", alignment="score_kl"))
    expected = total.item() + sum(score_kl(emb(N, d), emb(N, 32)).item() for d in (8, 16))
    assert aligned.item() == pytest.approx(expected, rel=1e-5)


def test_separate():
    total, _ = compute(objective("separate"))
    assert total.item() == pytest.approx(loss(4, 32), rel=1e-6)
    small = Objective("separate", parse_ladder(["2x16"]), N, H)
    assert small.plan(random.Random(0)).layers == (2,)
    assert compute(small)[0].item() == pytest.approx(loss(2, 16), rel=1e-6)


def test_separate_at_full_width_trains_all_dimensions():
    small = Objective("separate", parse_ladder(["2x16"]), N, H, separate_full_width=True)
    total, parts = compute(small)
    assert total.item() == pytest.approx(loss(2, H), rel=1e-6)
    assert list(parts) == ["loss/2x32"]


def test_separate_learns_from_embeddings_cut_nowhere():
    """One size, and the similarities of a teacher's whole vectors, also on texts without labels."""
    settings = {"teacher": "embeddings", "alignment": "score_kl", "alignment_weight": 3.0, "unlabeled_weight": 0.5}
    plan = Objective("separate", parse_ladder(["2x16"]), N, H, **settings).plan(random.Random(0))
    states = torch.cat((STATES, STATES[:, :5] + 0.5), dim=1)
    vectors = torch.randn(17, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = Rows((4, 4, 4), unlabeled=5)
    assert plan.layers == (2,)
    total, parts = plan_loss(plan, states[[1]], rows, "infonce", start=vectors)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    expected = [score_kl(emb(2, 16, states)[side], unit[side]).item() for side in (slice(12), slice(12, 17))]
    assert parts["alignment/2x16"].item() == pytest.approx(expected[0], rel=1e-5)
    assert parts["unlabeled/2x16"].item() == pytest.approx(expected[1], rel=1e-5)
    assert total.item() == pytest.approx(loss(2, 16) + 3 * expected[0] + 0.5 * expected[1], rel=1e-5)


def test_espresso():
    """The released code divides the sum over the layers below the last by N - 1."""
    expected = loss(N, H)
    for n in range(1, N + 1):
        weight = 1.0 if n == N else 1 / (1 + math.log(n)) / (N - 1)
        expected += weight * (loss(n, 16) + pca_distance(STATES[n - 1].float(), 16).item())
    total, _ = compute(objective("espresso", compression_dim=16))
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("alignment", ["feature_kl", "score_kl"])
def test_the_teacher_gets_no_gradient_from_the_alignment(name, alignment):
    spec = objective(name, alignment=alignment, compression_dim=16, feature_kl_form="raw_detached")
    plan = spec.plan(random.Random(1))
    aligned = plan._replace(terms=())
    if not aligned.alignments:
        assert name == "separate"
        return
    states = STATES[[n - 1 for n in aligned.layers]].clone().requires_grad_()
    total, _ = plan_loss(aligned, states, TRIPLETS, "infonce")
    total.backward()
    teachers = {a.teacher.num_layers for a in aligned.alignments} - {a.student.num_layers for a in aligned.alignments}
    for index, n in enumerate(aligned.layers):
        if n in teachers:
            assert states.grad[index].abs().max() == 0
        elif name != "matryoshka":
            assert states.grad[index].abs().max() > 0
    if name == "matryoshka":  # teacher and student share a state: only the columns of the students may get gradients
        assert states.grad[..., :16].abs().max() > 0
        assert states.grad[..., 16:].abs().max() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("base", ["infonce", "cosent", "angle", "cosine_mse"])
def test_every_objective_takes_every_loss(name, base):
    rows = TRIPLETS if base == "infonce" else Rows((6, 6), torch.linspace(0, 1, 6))
    states = STATES.clone().requires_grad_()
    spec = objective(name, compression_dim=16)
    total, parts = compute(spec, states=states, rows=rows, loss=base)
    total.backward()
    assert total.isfinite()
    assert states.grad.isfinite().all()
    assert states.grad[N - 1].abs().max() > 0
    assert all(not value.requires_grad for value in parts.values())


def test_one_layer_model():
    plan = Objective("2dmse", parse_ladder(["1x8"]), 1, H).plan(random.Random(0))
    assert plan.layers == (1,)
    assert plan.alignments == ()


@pytest.mark.parametrize("name", ["starbucks", "2dmse", "espresso"])
def test_crossed_sizes_equal_a_loop(name):
    """Anchors at a shallow size, positives and negatives at the deepest layer with the same dim."""
    rng = random.Random(3)
    plain, _ = compute(objective(name), random.Random(3))
    total, parts = compute(objective(name, cross_size_weight=0.5), rng)
    crossed = {part: value.item() for part, value in parts.items() if part.startswith("cross/")}
    trained = {part.removeprefix("loss/") for part in parts if part.startswith("loss/")}
    shallow = {size for size in trained if int(size.split("x")[0]) < N}
    assert {part.removeprefix("cross/") for part in crossed} == shallow
    assert shallow
    for part, value in crossed.items():
        n, d = map(int, part.removeprefix("cross/").split("x"))
        anchors, others = emb(n, d)[:4], emb(N, d)[4:]
        expected = 0.0
        for i in range(4):
            logits = [20 * sum(a * b for a, b in zip(anchors[i], other, strict=True)).item() for other in others]
            expected += (math.log(sum(math.exp(x) for x in logits)) - logits[i]) / 4
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert total.item() == pytest.approx(plain.item() + 0.5 * sum(crossed.values()), rel=1e-5)


def test_crossed_sizes_train_both_sides():
    plan = objective("starbucks", alignment="none", cross_size_weight=1.0).plan(None)
    states = STATES[[n - 1 for n in plan.layers]].clone().requires_grad_()
    only = plan._replace(terms=(), alignments=())
    assert only.layers == plan.layers
    plan_loss(only, states, TRIPLETS, "infonce")[0].backward()
    moved = states.grad.abs().amax(dim=2) > 0
    assert moved[:2, :4].all(), "anchors at the shallow exits"
    assert moved[2, 4:].all(), "documents at the deepest"
    assert not moved[:2, 4:].any()
    assert not moved[2, :4].any()


@pytest.mark.parametrize("name", ["starbucks", "2dmse", "espresso"])
@pytest.mark.parametrize("with_start", [False, True])
def test_unlabeled_rows_are_only_aligned(name, with_start):
    """The loss is the sum of the loss of the labeled rows and the alignments of the unlabeled rows."""
    generator = torch.Generator().manual_seed(2)
    unlabeled_states = torch.randn(N, 5, H, generator=generator, dtype=torch.float64)
    starts = torch.randn(12, H, generator=generator), torch.randn(5, H, generator=generator)
    settings = {"alignment": "score_kl", "teacher": "start"} if with_start and name != "espresso" else {}
    start = (lambda *parts: torch.cat(parts)) if settings else (lambda *parts: None)

    def run(spec, states, rows, start, **change):
        plan = spec.plan(random.Random(3))._replace(**change)
        return plan_loss(plan, states[[n - 1 for n in plan.layers]], rows, "infonce", start=start)

    spec = objective(name, alignment_weight=2.0, cross_size_weight=0.5, unlabeled_weight=0.3, **settings)
    both = torch.cat((STATES, unlabeled_states), dim=1)
    total, parts = run(spec, both, Rows((4, 4, 4), unlabeled=5), start(*starts))
    usual = objective(name, alignment_weight=2.0, cross_size_weight=0.5, **settings)
    labeled, labeled_parts = run(usual, STATES, TRIPLETS, start(starts[0]))
    alone = objective(name, alignment_weight=0.3, **settings)
    unlabeled, unlabeled_parts = run(alone, unlabeled_states, Rows((5,)), start(starts[1]), terms=())
    assert total.item() == pytest.approx(labeled.item() + unlabeled.item(), rel=1e-5)
    assert unlabeled.item() > 0.01
    renamed = {name.replace("alignment/", "unlabeled/"): value for name, value in unlabeled_parts.items()}
    expected = labeled_parts | renamed
    assert set(parts) == set(expected)
    for part, value in expected.items():
        assert parts[part].item() == pytest.approx(value.item(), rel=1e-5), part


def test_unlabeled_rows_equal_a_loop():
    """starbucks: KL of the softmax over all other unlabeled rows, from the largest size to each smaller size."""
    states = torch.cat((STATES, STATES[:, :5] + 0.5), dim=1)
    _, parts = compute(objective("starbucks", unlabeled_weight=1.0), states=states, rows=Rows((4, 4, 4), unlabeled=5))
    for n, d in ((1, 8), (2, 16)):
        student, teacher, expected = emb(n, d, states)[12:], emb(4, 32, states)[12:], 0.0
        for i in range(5):
            others = [j for j in range(5) if j != i]
            sides = [[math.exp(20 * (e[i] @ e[j]).item()) for j in others] for e in (teacher, student)]
            p, q = ([value / sum(side) for value in side] for side in sides)
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
        assert parts[f"unlabeled/{n}x{d}"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("teacher", ["start", "embeddings"])
def test_shallow_steps_train_the_sizes_of_one_or_two_thirds_of_the_layers_towards_the_full_size(teacher):
    ladder = parse_ladder(["1x8", "2x16", "3x16", "4x16", "5x32", "6x32"])
    spec = Objective("starbucks", ladder, 6, 32, alignment_weight=3.0, teacher=teacher, shallow_steps=0.75)
    rng, whole = random.Random(0), replace(spec, shallow_steps=0.0).plan(random.Random(0))
    plans = [spec.plan(rng) for _ in range(600)]
    found = {layers: [plan for plan in plans if max(plan.layers) == layers] for layers in (2, 4, 6)}
    for layers, share in ((2, 1 / 2), (4, 1 / 4), (6, 1 / 4)):
        assert len(found[layers]) / len(plans) == pytest.approx(share, abs=0.05)
    assert set(found[6]) == {whole}
    for layers in (2, 4):
        (plan,) = set(found[layers])
        assert plan.terms == tuple(Term(size, 1.0) for size in ladder[:layers])
        assert plan.alignments == tuple(Alignment("score_kl", size, ladder[-1], 3.0) for size in ladder[:layers])
        assert plan.layers == tuple(range(1, layers + 1)), "deeper sizes do not run"
    assert spec.exits == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("layers", "shallow", "middle"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 1, 2), (6, 2, 4), (12, 4, 8)]
)
def test_shallow_and_middle_layers(layers, shallow, middle):
    ladder = {f"{shallow}x16", f"{layers}x32"}
    spec = Objective("starbucks", parse_ladder(ladder), layers, 32)
    assert (spec.shallow_layers, spec.middle_layers) == (shallow, middle)
    if shallow < layers:  # without a size of a third of the layers, all shallow steps reach to two thirds
        assert replace(spec, ladder=spec.ladder[1:]).shallow_layers == middle


def test_a_shallow_step_equals_a_loop():
    spec = Objective("starbucks", LADDER, 6, H, teacher="embeddings", alignment_weight=3.0, shallow_steps=0.99)
    plan, start = spec.plan(random.Random(0)), STATES[3].flip(0)
    sides = [torch.nn.functional.normalize(states, dim=-1) for states in (STATES[0, :, :8], STATES[1, :, :16], start)]
    expected = sum(
        base_loss("infonce", side, TRIPLETS).item() + 3 * score_kl(side, sides[2]).item() for side in sides[:2]
    )
    total, parts = plan_loss(plan, STATES[:2], TRIPLETS, "infonce", start=start)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert set(parts) == {"loss/1x8", "loss/2x16", "alignment/1x8", "alignment/2x16"}
