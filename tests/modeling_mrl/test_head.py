"""MatryoshkaHead and its loss against loops in float64."""

import math

import pytest
import torch

from modeling_mrl import MatryoshkaHead, nested_loss

DIMS, CLASSES, HIDDEN = [2, 3, 8], 4, 8


@pytest.fixture
def states():
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def head(kind: str, dims=DIMS) -> MatryoshkaHead:
    torch.manual_seed(1)
    return MatryoshkaHead(dims, CLASSES, kind).double()


def loop(module: MatryoshkaHead, states: torch.Tensor, dim: int) -> list[list[float]]:
    """Logits of the first `dim` dimensions, one number at a time."""
    linear = module.linear if module.head_type == "tied" else module.linears[module.dims.index(dim)]
    weight, bias = linear.weight.tolist(), linear.bias.tolist()
    return [
        [sum(row[j] * weight[c][j] for j in range(dim)) + bias[c] for c in range(CLASSES)] for row in states.tolist()
    ]


@pytest.mark.parametrize("kind", ["separate", "tied"])
def test_logits_are_those_of_a_loop(kind, states):
    module = head(kind)
    logits = module(states)
    assert logits.shape == (len(DIMS), len(states), CLASSES)
    for index, dim in enumerate(DIMS):
        expected = torch.tensor(loop(module, states, dim), dtype=torch.float64)
        assert expected.abs().max() > 0.1
        assert torch.allclose(logits[index].double(), expected, atol=1e-6)
        assert torch.allclose(module.logits(states, dim).double(), expected, atol=1e-6)


def test_shapes_of_the_weights():
    separate, tied = head("separate"), head("tied")
    assert [tuple(linear.weight.shape) for linear in separate.linears] == [(CLASSES, m) for m in DIMS]
    assert [tuple(p.shape) for p in tied.parameters()] == [(CLASSES, HIDDEN), (CLASSES,)]


def test_a_tied_head_at_full_size_is_a_linear_layer(states):
    tied = head("tied").float()
    linear = torch.nn.Linear(HIDDEN, CLASSES)
    linear.load_state_dict(tied.linear.state_dict())
    assert torch.equal(tied.logits(states.float(), HIDDEN), linear(states.float()))
    assert torch.allclose(tied(states.float())[-1], linear(states.float()), atol=1e-6)


def test_wider_logits_only_add_the_part_of_the_new_columns(states):
    tied = head("tied")
    for previous, dim in [(2, 3), (3, 8), (2, 8)]:
        narrow = tied.logits(states, previous)
        weight = tied.linear.weight
        by_hand = narrow + (states[:, previous:dim] @ weight[:, previous:dim].T).float()
        wide = tied.widen(states, dim, narrow, previous)
        assert torch.allclose(wide, by_hand, atol=1e-6)
        assert torch.allclose(wide, tied.logits(states, dim), atol=1e-6)
        assert not torch.allclose(wide, narrow, atol=1e-2)
    blind = states.clone()
    blind[:, :2] = math.nan  # the first columns are not read again
    assert torch.isfinite(tied.widen(blind, 3, tied.logits(states, 2), 2)).all()


@pytest.mark.parametrize("kind", ["separate", "tied"])
def test_no_gradient_beyond_the_size(kind, states):
    for index, dim in enumerate(DIMS):
        module = head(kind)
        x = states.clone().requires_grad_()
        weights = [float(i == index) for i in range(len(DIMS))]
        nested_loss(module(x), torch.tensor([0, 1, 2, 3, 0]), weights)[0].backward()
        assert (x.grad[:, :dim] != 0).all()
        assert (x.grad[:, dim:] == 0).all()
        if kind == "tied":
            assert (module.linear.weight.grad[:, :dim] != 0).all()
            assert (module.linear.weight.grad[:, dim:] == 0).all()
        else:
            touched = [(linear.weight.grad != 0).any().item() for linear in module.linears]
            assert touched == [i == index for i in range(len(DIMS))]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_a_loop(states, reduction, smoothing):
    module, weights, labels = head("separate"), [0.5, 2.0, 0.0], [0, 3, 1, 1, 2]
    expected = []
    for dim in DIMS:
        total = 0.0
        for row, label in zip(loop(module, states, dim), labels, strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            target = [(1 - smoothing) * (c == label) + smoothing / CLASSES for c in range(CLASSES)]
            total -= sum(t * (value - log_sum) for t, value in zip(target, row, strict=True))
        expected.append(total / len(labels))
    loss, losses = nested_loss(module(states), torch.tensor(labels), weights, reduction, smoothing)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    weighted = sum(w * value for w, value in zip(weights, expected, strict=True))
    assert loss.item() == pytest.approx(weighted / (3 if reduction == "mean" else 1), abs=1e-6)
    assert nested_loss(module(states), torch.tensor(labels))[0].item() == pytest.approx(
        nested_loss(module(states), torch.tensor(labels), [1, 1, 1])[0].item()
    )


@pytest.mark.parametrize("kind", ["separate", "tied"])
def test_a_cut_head_gives_the_same(kind, states):
    module = head(kind)
    small = module.cut(3)
    assert sum(p.numel() for p in small.parameters()) == CLASSES * 3 + CLASSES
    assert torch.equal(small(states)[0], module.logits(states, 3))


def test_untrained_prefixes_are_refused(states):
    tied, separate = head("tied"), head("separate")
    assert torch.allclose(tied.logits(states, 5).double(), torch.tensor(loop(tied, states, 5)).double(), atol=1e-6)
    with pytest.raises(ValueError, match=r"dim: 5 has no trained head; this separate head has \[2, 3, 8\]"):
        separate.logits(states, 5)
    for module in (tied, separate):
        for dim in (0, 9):
            with pytest.raises(ValueError, match=f"dim: {dim} has no trained head"):
                module.logits(states, dim)
    for dims in ([], [3, 2], [2, 2], [0, 2]):
        with pytest.raises(ValueError, match="dims: "):
            MatryoshkaHead(dims, CLASSES)
    with pytest.raises(ValueError, match="head_type: 'shared' is unknown"):
        MatryoshkaHead(DIMS, CLASSES, "shared")
