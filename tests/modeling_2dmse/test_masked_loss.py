"""The chunked cross-entropy against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from modeling_2dmse import masked_loss
from modeling_2dmse.masked_loss import vocabulary_loss


def _case(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    states = torch.randn(13, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True) if bias else None
    return states, weight, bias, torch.randint(11, (13,)), torch.rand(13)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_cross_entropy_for_every_chunk_size(monkeypatch, chunk, bias):
    monkeypatch.setattr(masked_loss, "_CHUNK_LOGITS", 11 * chunk)
    states, weight, bias, targets, factors = _case(bias=bias)
    leaves = [leaf for leaf in (states, weight, bias) if leaf is not None]
    rows = F.cross_entropy(F.linear(states, weight, bias), targets, reduction="none")
    expected = torch.autograd.grad(3 * (rows * factors).sum(), leaves)
    loss, losses, hits = vocabulary_loss(states, weight, bias, targets, factors)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, rows.detach())
    assert hits.tolist() == (F.linear(states, weight, bias).argmax(1) == targets).tolist()
    for ours, reference in zip(torch.autograd.grad(3 * loss, leaves), expected, strict=True):
        assert reference.abs().max() > 0.01
        torch.testing.assert_close(ours, reference)


def test_computes_no_gradient_that_is_not_needed(monkeypatch):
    states, weight, bias, targets, factors = _case()
    with torch.no_grad():
        assert not vocabulary_loss(states, weight, bias, targets, factors)[0].requires_grad
    weight.requires_grad_(False)
    loss, *_ = vocabulary_loss(states, weight, bias, targets, factors)
    loss.backward()
    assert states.grad.abs().max() > 0
    assert weight.grad is None


def test_half_precision_is_close_and_keeps_the_parameters_type():
    states, weight, bias, targets, factors = _case(torch.float32)
    exact = torch.autograd.grad(vocabulary_loss(states, weight, bias, targets, factors)[0], (states, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *_ = vocabulary_loss(states, weight, bias, targets, factors)
    half = torch.autograd.grad(loss, (states, weight))
    assert loss.dtype == torch.float32
    for ours, reference in zip(half, exact, strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, reference)
        assert F.cosine_similarity(ours.flatten(), reference.flatten(), dim=0) > 0.999


def test_no_rows_give_zero():
    states, weight, bias, targets, factors = _case()
    loss, losses, _ = vocabulary_loss(states[:0], weight, bias, targets[:0], factors[:0])
    assert loss == 0
    assert len(losses) == 0
    loss.backward()
    assert weight.grad.abs().max() == 0
