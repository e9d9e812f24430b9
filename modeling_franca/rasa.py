"""RASA: finding and removing the directions of dense features that encode the position of a patch."""

import torch
import torch.nn.functional as F
from torch import nn

METHODS = ("gradient", "ridge", "covariance")


def grid_positions(height: int, width: int) -> torch.Tensor:
    """Row and column of each patch, (height * width, 2) from 0 to 1, in the order of a vision transformer's tokens.

    >>> grid_positions(2, 2).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    return torch.cartesian_prod(rows, columns)


class RasaProjector(nn.Module):
    """Removal of absolute spatial attributes (Franca, section 3.3): x - V V^T x.

    The columns of V are an orthonormal basis of all directions from which positions were predicted. Applying the
    projector twice gives the same as applying it once.

    Args:
        basis: (D, r) with orthonormal columns.
    """

    basis: torch.Tensor

    def __init__(self, basis: torch.Tensor):
        super().__init__()
        self.register_buffer("basis", basis)

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        positions: torch.Tensor,
        method: str = "gradient",
        iterations: int = 1,
        ridge: float = 1e-3,
        steps: int = 100,
    ) -> "RasaProjector":
        """Find the directions, two (row and column) per iteration, each iteration on the remainder of the earlier ones.

        Args:
            features: (images, patches, D) patch tokens, or (n, D).
            positions: (patches, 2) or (n, 2) from `grid_positions`.
            method: `gradient`: weights of sigmoid(W x), fitted to the mean squared error as in the released code;
                `ridge`: the closed-form linear predictor; `covariance`: the cross-covariance of features and positions,
                after whose removal no linear predictor finds anything, so one iteration is enough.
            iterations: number of iterations; the directions of all are removed together.
            ridge: strength of `ridge`, as a fraction of the features' mean variance.
            steps: of `gradient`, L-BFGS on all features.

        Raises:
            ValueError: the method is unknown, the shapes do not match, or `iterations` is below 1.
        """
        if method not in METHODS:
            raise ValueError(f"method: {method!r} is unknown; choose one of {', '.join(METHODS)}")
        if iterations < 1:
            raise ValueError(f"iterations: {iterations} is not allowed; use a whole number from 1")
        inputs, targets = _flatten(features, positions)
        mean, spread = inputs.mean(dim=0), targets - targets.mean(dim=0)
        basis = inputs.new_zeros((inputs.shape[1], 0))
        for _ in range(iterations):
            rest = inputs - inputs @ basis @ basis.T
            centered = rest - (mean - basis @ (basis.T @ mean))
            if method == "gradient":
                found = _fit_gradient(rest, targets, steps)
            elif method == "ridge":
                found = _fit_ridge(centered, spread, ridge)
            else:
                found = centered.T @ spread
            basis = _extend(basis, found)
        return cls(basis.to(torch.float32))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) features without the directions that encode position."""
        basis = self.basis.to(features.dtype)
        return features - (features @ basis) @ basis.T

    def as_linear(self) -> nn.Linear:
        """The same as a linear layer from D to D without bias."""
        size = self.basis.shape[0]
        linear = nn.Linear(size, size, bias=False, device=self.basis.device, dtype=self.basis.dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.eye(size, device=self.basis.device) - self.basis @ self.basis.T)
        return linear

    @torch.no_grad()
    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """A copy of a linear layer on features; its output for x is the layer's output for the projected x."""
        if linear.in_features != self.basis.shape[0]:
            raise ValueError(
                f"linear: it takes {linear.in_features} features, but the projector is for {self.basis.shape[0]}"
            )
        device, dtype = linear.weight.device, linear.weight.dtype
        has_bias = linear.bias is not None
        folded = nn.Linear(linear.in_features, linear.out_features, bias=has_bias, device=device, dtype=dtype)
        folded.weight.copy_(self(linear.weight.to(self.basis.device)))
        if linear.bias is not None:
            folded.bias.copy_(linear.bias)
        return folded


def _flatten(features: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, D) features and their (n, 2) positions in float64."""
    if features.dim() == 3 and len(positions) == features.shape[1]:
        positions = positions.repeat(len(features), 1)
        features = features.flatten(0, 1)
    if features.dim() != 2 or positions.shape != (len(features), 2):
        raise ValueError(
            f"positions: {tuple(positions.shape)} does not match features {tuple(features.shape)}; give (patches, 2) "
            "for (images, patches, D)"
        )
    return features.detach().double(), positions.to(features.device).double()


def _fit_ridge(inputs: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """(D, 2) weights of the linear predictor of centred targets from centred inputs."""
    covariance = inputs.T @ inputs
    size = len(covariance)
    strength = ridge * covariance.trace() / size
    covariance.diagonal().add_(strength.clamp_min(torch.finfo(inputs.dtype).tiny))
    return torch.linalg.solve(covariance, inputs.T @ targets)


def _fit_gradient(inputs: torch.Tensor, targets: torch.Tensor, steps: int) -> torch.Tensor:
    """(D, 2) weights W of sigmoid(W x), starting from 0; their gradients lie in the span of the inputs."""
    with torch.enable_grad():
        weight = inputs.new_zeros((inputs.shape[1], 2), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(torch.sigmoid(inputs @ weight), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach()


def _extend(basis: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of both; directions that are already in the basis add nothing."""
    for column in F.normalize(found, dim=0).T:
        for _ in range(2):  # a single pass leaves rounding errors
            column = column - basis @ (basis.T @ column)
        length = column.norm()
        if length > 1e-6:
            basis = torch.cat((basis, (column / length)[:, None]), dim=1)
    return basis


__all__ = ["RasaProjector", "grid_positions"]
