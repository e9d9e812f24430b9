"""Every loss and alignment, compared with a simple float64 loop and with finite differences."""

import math

import pytest
import torch

from modeling_2dmse.pooling import cut_and_normalize
from trainer import alignment
from trainer.alignment import feature_kl, pca, pca_distance, score_kl
from trainer.losses import Rows, angle, base_loss, cosent, cosine_mse, infonce


def vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    raw = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(raw, dim=-1)


def cosine(x, y) -> float:
    return float(sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)))


SCORES = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0], dtype=torch.float64)


def test_a_batch_of_another_collator_is_refused():
    with pytest.raises(ValueError, match="data_collator: its batches have no counts; leave it out"):
        Rows.of_batch({"input_ids": torch.zeros(2, 3)})


def test_infonce_with_hard_negatives():
    a, p, n = vectors(5, 6, 0), vectors(5, 6, 1), vectors(5, 6, 2)
    expected = 0.0
    for i in range(5):
        logits = [20 * cosine(a[i], c) for c in [*p, *n]]
        expected -= logits[i] - math.log(sum(math.exp(x) for x in logits))
    assert base_loss("infonce", torch.cat((a, p, n)), Rows((5, 5, 5))).item() == pytest.approx(expected / 5, abs=1e-10)
    # the positive may be in any row of the candidates
    moved = infonce(a, torch.cat((n, p)), torch.arange(5, 10))
    assert moved.item() == pytest.approx(expected / 5, abs=1e-10)


def test_cosent():
    x, y = vectors(5, 6, 0), vectors(5, 6, 1)
    cos = [cosine(x[i], y[i]) for i in range(5)]
    total = 1.0
    for i in range(5):
        for j in range(5):
            if SCORES[i] > SCORES[j]:
                total += math.exp(20 * (cos[j] - cos[i]))
    assert cosent(x, y, SCORES).item() == pytest.approx(math.log(total), abs=1e-10)


def test_angle():
    x, y = vectors(5, 6, 0), vectors(5, 6, 1)
    difference = []
    for i in range(5):
        z = [complex(x[i][k], x[i][k + 3]) for k in range(3)]
        w = [complex(y[i][k], y[i][k + 3]) for k in range(3)]
        length = [math.sqrt(sum(abs(c) ** 2 for c in v)) for v in (z, w)]
        # the moduli are those of the whole vectors, as in AnglE's code
        quotient = [a * b.conjugate() / length[1] ** 2 * (length[1] / length[0]) for a, b in zip(z, w, strict=True)]
        difference.append(abs(sum(q.real + q.imag for q in quotient)))
    total = 1.0
    for i in range(5):
        for j in range(5):
            if SCORES[i] > SCORES[j]:
                total += math.exp(20 * (difference[j] - difference[i]))
    assert angle(x, y, SCORES).item() == pytest.approx(math.log(total), abs=1e-10)


def test_cosine_mse():
    x, y = vectors(5, 6, 0), vectors(5, 6, 1)
    expected = sum((cosine(x[i], y[i]) - SCORES[i].item()) ** 2 for i in range(5)) / 5
    assert cosine_mse(x, y, SCORES).item() == pytest.approx(expected, abs=1e-12)


def softmax(values):
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [p / sum(parts) for p in parts]


def kl(teacher, student) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student), strict=True))


def test_feature_kl():
    s, t = vectors(4, 6, 0) * 3, vectors(4, 6, 1) * 3
    expected = sum(kl(t[i].tolist(), s[i].tolist()) for i in range(4)) / 4
    assert expected > 0.01
    assert feature_kl(s, t).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("scores", [1, 30, 33, 71])
def test_score_kl_in_blocks_equals_score_kl_of_all_rows(scores, monkeypatch):
    t = torch.nn.functional.normalize(vectors(10, 8, 1), dim=-1)
    results = []
    for limit in (10_000, scores):
        monkeypatch.setattr(alignment, "_BLOCK_SCORES", limit)
        s = vectors(10, 4, 0).requires_grad_()
        value = score_kl(torch.nn.functional.normalize(s, dim=-1), t)
        value.backward()
        results.append((value.detach(), s.grad))
    assert results[0][1].abs().max() > 1e-3
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks)


def test_score_kl_leaves_out_the_diagonal():
    s, t = vectors(4, 3, 0), vectors(4, 6, 1)
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        expected += kl([20 * cosine(t[i], t[j]) for j in others], [20 * cosine(s[i], s[j]) for j in others]) / 4
    assert expected > 0.01
    assert score_kl(s, t).item() == pytest.approx(expected, abs=1e-10)


def test_pca_distance():
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dependencies = torch.tensor(
        [softmax([float(v) / math.sqrt(6) for v in row]) for row in x.T @ x], dtype=torch.float64
    )
    # singular directions of A are the eigenvectors of A A^T
    values, directions = torch.linalg.eigh(dependencies @ dependencies.T)
    columns = []
    for k in (5, 4, 3):
        v = directions[:, k]
        columns.append(x @ (v * v[v.abs().argmax()].sign() * values[k].sqrt()))
    target = torch.stack(columns, dim=1)
    assert torch.allclose(pca(x, 3), target, atol=1e-8)
    expected = ((x[:, :3] - target) ** 2).mean().item()
    expected += sum(kl(target[i].tolist(), x[i, :3].tolist()) for i in range(7)) / 7
    assert pca_distance(x, 3).item() == pytest.approx(expected, abs=1e-8)
    assert torch.equal(pca(x, 3), pca(x.clone(), 3))


@pytest.mark.parametrize("loss", ["infonce", "cosent", "angle", "cosine_mse"])
def test_gradients_of_losses_at_a_size(loss):
    raw = torch.randn(6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    scores = None if loss == "infonce" else torch.tensor([0.2, 0.8, 0.5], dtype=torch.float64)

    def at_size_4(x):
        embedding = torch.nn.functional.normalize(x[:, :4], dim=-1)
        return base_loss(loss, embedding, Rows((len(x) // 2,) * 2, scores), scale=2.0)

    assert torch.autograd.gradcheck(at_size_4, raw)
    at_size_4(raw).backward()
    assert raw.grad[:, :4].abs().max() > 0
    assert raw.grad[:, 4:].abs().max() == 0


def test_gradients_of_alignments_reach_only_the_student():
    s, t = vectors(5, 6, 0).requires_grad_(), vectors(5, 6, 1).requires_grad_()
    for distance in (feature_kl, score_kl):
        assert torch.autograd.gradcheck(lambda x, distance=distance: distance(x, t.detach()), s)
        s.grad = t.grad = None
        distance(s, t).backward()
        assert s.grad.abs().max() > 1e-4
        assert t.grad is None
    state = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    pca_distance(state, 2).backward()
    assert state.grad[:, :2].abs().max() > 0
    assert state.grad[:, 2:].abs().max() == 0  # nothing flows through the target


def test_embeddings_keep_the_first_columns_and_unit_norm():
    x = torch.randn(3, 8)
    assert torch.allclose(cut_and_normalize(x, 4), x[:, :4] / x[:, :4].norm(dim=1, keepdim=True))
