"""RASA: directions that encode position are found and removed completely."""

import pytest
import torch
from tiny_vision import tiny_model
from torch import nn

from modeling_franca import FrancaModel, RasaProjector, grid_positions
from modeling_franca.rasa import METHODS
from trainer.franca.evaluation import position_r2


def features_with_position(images: int = 60, seed: int = 0) -> torch.Tensor:
    """(images, 16, 12): noise of unequal variance, to which rows and columns add along two directions."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((images, 16, 12), generator=generator) * torch.linspace(0.2, 2, 12)
    mixing = torch.linalg.qr(torch.randn((12, 12), generator=torch.Generator().manual_seed(9)))[0]
    directions = torch.randn((2, 12), generator=torch.Generator().manual_seed(10))
    return noise @ mixing + grid_positions(4, 4) @ directions + 1.0


@pytest.fixture(scope="module")
def features():
    return features_with_position()


def test_positions_are_in_the_order_of_the_tokens():
    expected = [[row / 2, column / 3] for row in range(3) for column in range(4)]
    assert torch.allclose(grid_positions(3, 4), torch.tensor(expected))


@pytest.mark.parametrize("method", METHODS)
def test_a_projector_is_orthogonal_and_idempotent(method, features):
    projector = RasaProjector.fit(features, grid_positions(4, 4), method, iterations=1 if method == "covariance" else 3)
    basis = projector.basis
    assert basis.shape == (12, 2 if method == "covariance" else 6)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-6)
    once = projector(features)
    assert torch.allclose(projector(once), once, atol=1e-5)
    assert (once - features).abs().max() > 0.1
    assert (once @ basis).abs().max() < 1e-5
    assert torch.allclose(projector.as_linear()(features), once, atol=1e-5)


def test_ridge_is_the_closed_form(features):
    x, p = features.flatten(0, 1).double(), grid_positions(4, 4).repeat(len(features), 1).double()
    x, p = x - x.mean(0), p - p.mean(0)
    weight = torch.linalg.lstsq(x, p).solution
    plane = torch.linalg.qr(weight)[0]
    found = RasaProjector.fit(features, grid_positions(4, 4), "ridge", ridge=0.0).basis.double()
    assert torch.allclose(found @ found.T, plane @ plane.T, atol=1e-5)


def test_gradient_minimises_the_squared_error_of_a_sigmoid(features):
    found = RasaProjector.fit(features, grid_positions(4, 4), "gradient").basis
    x, p = features.flatten(0, 1), grid_positions(4, 4).repeat(len(features), 1)
    weight = torch.zeros((12, 2), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(3000):
        optimizer.zero_grad()
        (torch.sigmoid(x @ weight) - p).square().mean().backward()
        optimizer.step()
    plane = torch.linalg.qr(weight.detach())[0]
    assert torch.allclose(found @ found.T, plane @ plane.T, atol=0.02)


def test_no_linear_predictor_finds_position_after_the_covariance_variant(features):
    positions, others = grid_positions(4, 4), features_with_position(seed=1)
    scores = {"none": position_r2(features, others, positions)}
    for method in METHODS:
        projector = RasaProjector.fit(features, positions, method)
        scores[method] = position_r2(projector(features), projector(others), positions)
    assert scores["none"] > 0.5
    assert scores["covariance"] < 0.01
    assert scores["ridge"] < scores["none"], (
        "some position is left after one iteration of the predictor's own direction"
    )
    many = RasaProjector.fit(features, positions, "ridge", iterations=5)
    assert position_r2(many(features), many(others), positions) < scores["ridge"]


def test_position_r2_is_least_squares_on_other_images(features):
    positions, others = grid_positions(4, 4).double(), features_with_position(seed=1).double()
    ones = torch.ones(960, 1, dtype=torch.float64)
    x, y = (torch.cat((part.double().flatten(0, 1), ones), dim=1) for part in (features, others))
    target = positions.repeat(60, 1)
    errors = y @ torch.linalg.lstsq(x, target).solution - target
    expected = 1 - errors.square().sum() / (target - target.mean(0)).square().sum()
    assert position_r2(features, others, positions) == pytest.approx(expected.item(), abs=1e-4)
    assert position_r2(torch.randn_like(features), others, positions) < 0.1


def test_folding_into_a_linear_layer(features):
    projector = RasaProjector.fit(features, grid_positions(4, 4), "covariance")
    linear = nn.Linear(12, 5)
    folded = projector.fold_into(linear)
    assert torch.allclose(folded(features), linear(projector(features)), atol=1e-5)
    assert not torch.allclose(folded(features), linear(features), atol=1e-2)
    with pytest.raises(ValueError, match="linear: it takes 3 features, but the projector is for 12"):
        projector.fold_into(nn.Linear(3, 5))


def test_folding_into_the_model_survives_saving(tmp_path):
    model = tiny_model().teacher
    pixels = torch.randn(20, 3, 16, 16)
    with torch.no_grad():
        plain = model(pixels)
    projector = RasaProjector.fit(plain.patch_tokens, grid_positions(4, 4), "ridge", iterations=2)
    assert model.fold(projector) is model
    model.save_pretrained(tmp_path)
    for folded in (model, FrancaModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            output = folded(pixels)
        assert torch.allclose(output.patch_tokens, projector(plain.patch_tokens), atol=1e-5)
        assert torch.allclose(output.pooler_output, plain.pooler_output, atol=1e-6)
    assert not torch.allclose(output.patch_tokens, plain.patch_tokens, atol=1e-3)
    with pytest.raises(ValueError, match="projector: this model has one folded in already"):
        model.fold(projector)
    with pytest.raises(ValueError, match="projector: it is for 12 dimensions, not for the model's 16"):
        tiny_model().teacher.fold(RasaProjector(torch.eye(12)[:, :2]))


def test_wrong_input(features):
    positions = grid_positions(4, 4)
    with pytest.raises(ValueError, match="method: 'svd' is unknown; choose one of gradient, ridge, covariance"):
        RasaProjector.fit(features, positions, "svd")
    with pytest.raises(ValueError, match="iterations: 0 is not allowed"):
        RasaProjector.fit(features, positions, iterations=0)
    with pytest.raises(ValueError, match=r"positions: \(9, 2\) does not match features \(60, 16, 12\)"):
        RasaProjector.fit(features, grid_positions(3, 3))
