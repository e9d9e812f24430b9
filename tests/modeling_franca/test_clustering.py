"""Heads, Sinkhorn-Knopp, KoLeo and CyclicMask against plain references."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LEAVE, run_processes
from tiny_vision import tiny_batch, tiny_config, tiny_model

from modeling_franca import CyclicMask, FrancaConfig, NestedClusteringHead, assignment_loss, koleo_loss, sinkhorn

ROOT = Path(__file__).resolve().parents[2]


def plain_sinkhorn(scores, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's loop, in float64, with plain exponentials."""
    rows, prototypes = scores.shape
    share = [[math.exp(scores[i][k].item() / temperature) for k in range(prototypes)] for i in range(rows)]
    for _ in range(iterations):
        for k in range(prototypes):
            total = sum(share[i][k] for i in range(rows))
            for i in range(rows):
                share[i][k] /= total * prototypes
        for i in range(rows):
            total = sum(share[i])
            share[i] = [value / (total * rows) for value in share[i]]
    return np.array(share) * rows


def cosines(rows: int, prototypes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((rows, prototypes), generator=generator) * 2 - 1


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("output", ["unit", "gelu"])
def test_a_head_ends_in_a_unit_vector_or_as_the_released_one_in_a_gelu(output, num_layers):
    head = NestedClusteringHead(8, (4, 8), (3, 6), "slice", num_layers, 12, 5, output).double()
    rows = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for level, (size, found) in enumerate(zip((4, 8), head(rows), strict=True)):
        linears = [module for module in head.mlps[level] if isinstance(module, torch.nn.Linear)]
        for row in range(7):
            x = rows[row, :size]
            for place, linear in enumerate(linears):
                x = torch.stack([(w * x).sum() + b for w, b in zip(linear.weight, linear.bias, strict=True)])
                if place < num_layers - 1 or (output == "gelu" and num_layers > 1):
                    x = torch.stack([0.5 * v * (1 + torch.erf(v / math.sqrt(2))) for v in x])
            if output == "unit":
                x = x / x.norm()
            expected = [(x * p / p.norm()).sum().item() for p in head.prototypes[level].weight]
            assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_plain_loop(iterations):
    scores = cosines(13, 5)
    found = sinkhorn(scores, 0.07, iterations)
    assert np.abs(found.numpy() - plain_sinkhorn(scores, 0.07, iterations)).max() < 1e-5
    softmax = torch.softmax(scores / 0.07, dim=1)
    assert (found - softmax).abs().max() > 0.1, "balancing does nothing"


def test_rows_sum_to_one_and_prototypes_are_balanced():
    scores = cosines(512, 32)
    scores[:, 0] += 0.5  # a prototype that every row prefers
    found = sinkhorn(scores, 0.07, 50)
    assert (found.sum(dim=1) - 1).abs().max() < 1e-6
    assert (found.sum(dim=0) / (512 / 32) - 1).abs().max() < 0.02
    unbalanced = sinkhorn(scores, 0.07, 1).sum(dim=0)
    assert (unbalanced / (512 / 32) - 1).abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(dtype):
    scores = (cosines(64, 8) * 1e4).to(dtype)
    assert torch.isinf((scores / 0.04).exp()).any(), "these scores are not large"
    found = sinkhorn(scores, 0.04, 3)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert (found.sum(dim=1) - 1).abs().max() < 1e-6


def test_rows_of_padding_change_nothing():
    scores = cosines(10, 4)
    padded = torch.cat((scores[:6], torch.full((3, 4), 50.0), scores[6:]))
    mask = torch.tensor([True] * 6 + [False] * 3 + [True] * 4)
    expected = sinkhorn(scores, 0.07, 3)
    found = sinkhorn(padded, 0.07, 3, mask)
    assert torch.allclose(found[mask], expected, atol=1e-6)
    assert (found[~mask] == 0).all()
    assert not torch.allclose(sinkhorn(padded, 0.07, 3)[mask], expected, atol=1e-2), "padding would not matter"
    assert sinkhorn(scores[:0], 0.07, 3).shape == (0, 4)


def check_processes(folder: str) -> None:
    """Run by each of two processes: its assignments, loss and gradients equal its part of a single process's."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counts, scores = (7, 3), cosines(10, 5)
    own = slice(0, 7) if rank == 0 else slice(7, 10)
    expected = torch.load(Path(folder) / "expected.pt")
    assert torch.allclose(sinkhorn(scores[own], 0.07, 3), expected["assigned"][own], atol=1e-6), counts
    empty = sinkhorn(scores if rank == 0 else scores[:0], 0.07, 3)  # one process has no rows
    assert torch.allclose(empty, expected["assigned"][: len(empty)], atol=1e-6)
    model = tiny_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    batch = {name: value[2 * rank : 2 * rank + 2] for name, value in tiny_batch().items()}
    output = wrapped(**batch)
    output.loss.backward()
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    assert abs(loss.item() / 2 - expected["loss"]) < 1e-5 * expected["loss"]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected["gradients"])
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    (Path(folder) / f"equal-{rank}").touch()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    model = tiny_model()
    output = model(**tiny_batch())
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    expected = {"assigned": sinkhorn(cosines(10, 5), 0.07, 3), "loss": output.loss.item(), "gradients": gradients}
    torch.save(expected, tmp_path / "expected.pt")
    code = f"import test_clustering as t; t.check_processes({str(tmp_path)!r})"
    (tmp_path / "run.py").write_text(code + LEAVE)
    run_processes(2, tmp_path / "run.py", folders=(ROOT, ROOT / "tests", Path(__file__).parent))
    assert len(list(tmp_path.glob("equal-*"))) == 2


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_head_is_a_perceptron_and_cosines(num_layers):
    torch.manual_seed(0)
    head = NestedClusteringHead(8, [2, 8], [3, 12], num_layers=num_layers, inner_size=6, bottleneck_size=5)
    z = torch.randn(4, 8)
    for level, (size, scores) in enumerate(zip((2, 8), head(z), strict=True)):
        point = z[:, :size]
        linears = [layer for layer in head.mlps[level] if isinstance(layer, torch.nn.Linear)]
        for index, linear in enumerate(linears):
            point = point @ linear.weight.T + linear.bias
            if index < len(linears) - 1:
                point = torch.nn.functional.gelu(point)
        prototypes = head.prototypes[level].weight
        expected = (point / point.norm(dim=1, keepdim=True)) @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T
        assert torch.allclose(scores, expected, atol=1e-6)
        assert len(linears) == num_layers
        assert scores.shape == (4, (3, 12)[level])


@pytest.mark.parametrize("head_input", ["slice", "projection"])
def test_a_level_has_no_gradient_beyond_its_columns(head_input):
    torch.manual_seed(0)
    sizes = [2, 4, 8]
    head = NestedClusteringHead(8, sizes, [3, 6, 12], head_input, inner_size=6, bottleneck_size=5)
    for level, size in enumerate(sizes):
        z = torch.randn(4, 8, requires_grad=True)
        scores = head(z)[level]
        assignment_loss(sinkhorn(scores.detach(), 0.07), scores, 0.1).mean().backward()
        assert (z.grad[:, :size] != 0).all()
        if head_input == "slice":
            assert (z.grad[:, size:] == 0).all()
        elif size < 8:
            assert (z.grad[:, size:] != 0).any(), "a projection sees all dimensions"


def test_prototypes_are_in_proportion_to_the_size():
    assert tiny_config(num_prototypes=25).level_prototypes == [6, 12, 25]
    assert [len(layer.weight) for layer in tiny_model().student_heads["patch"].prototypes] == [6, 12, 24]
    assert FrancaConfig().nesting_sizes == [48, 96, 192, 384, 768]


def test_koleo_is_the_plain_loop():
    torch.manual_seed(0)
    points = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    unit = [row / row.norm() for row in points]
    expected = 0.0
    for i, point in enumerate(unit):
        expected -= torch.log(min((point - other).norm() for j, other in enumerate(unit) if j != i)) / len(unit)
    found = koleo_loss(points)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, theirs = (torch.autograd.grad(loss, points)[0] for loss in (found, expected))
    assert theirs.abs().max() > 1e-2
    assert torch.allclose(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="koleo_weight: a batch of 1 has no nearest neighbour"):
        koleo_loss(points[:1])


@pytest.mark.parametrize(
    ("height", "width", "ratio"), [(6, 6, 0.5), (4, 7, 0.3), (8, 3, 0.8), (5, 5, 0.0), (4, 4, 0.99)]
)
def test_masks_have_an_exact_count_and_no_preferred_position(height, width, ratio):
    draws, rng = 4000, np.random.default_rng(0)
    mask = CyclicMask(height, width, ratio)
    drawn = np.array([mask(rng) for _ in range(draws)])
    assert drawn.shape == (draws, height, width)
    count = round(ratio * height * width)
    assert (drawn.sum(axis=(1, 2)) == count).all()
    share = count / (height * width)
    spread = math.sqrt(share * (1 - share) / draws)
    assert np.abs(drawn.mean(axis=0) - share).max() <= 4.5 * spread
    if 0 < count < height * width:
        assert len(np.unique(drawn.reshape(draws, -1), axis=0)) > 5


def test_the_visible_patches_are_one_block_on_the_torus():
    rng, mask = np.random.default_rng(1), CyclicMask(6, 8, 0.75)  # 12 visible
    wrapped = 0
    for _ in range(200):
        visible = ~mask(rng)
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        for used, edge in ((rows, 6), (columns, 8)):
            gaps = np.diff(np.append(used, used[0] + edge))
            assert (gaps > 1).sum() <= 1, "the rows and columns in use are one run, over the edge"
        assert len(rows) * len(columns) - 12 < len(columns), "only the block's last row is cut short"
        wrapped += np.ptp(rows) >= len(rows) or np.ptp(columns) >= len(columns)
    assert wrapped > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 1.0), "mask_ratio: 1.0 is not allowed; use a share from 0 to below 1"),
        ((4, 4, -0.1), "mask_ratio: -0.1 is not allowed"),
        ((4, 4, 0.5, 0.0), "min_aspect: 0.0 is not allowed"),
        ((0, 4, 0.5), "grid: 0x4 patches"),
    ],
)
def test_wrong_mask_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CyclicMask(*arguments)
