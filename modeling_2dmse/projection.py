"""The matrix that an exit may apply to its state."""

import torch


class ExitProjection(torch.nn.Linear):
    """The square matrix of one exit, applied in float32: (..., hidden) to (..., hidden), without bias.

    It is linear, and poolings are weighted means. A text may therefore be pooled before the projection (cheap) or
    after it (as stock sentence-transformers does with the token states), with the same result.

    Args:
        hidden_size: dimensions of a state.
        kwargs: passed to `torch.nn.Linear` (`device`, `dtype`).
    """

    def __init__(self, hidden_size: int, **kwargs):
        super().__init__(hidden_size, hidden_size, bias=False, **kwargs)

    def reset(self) -> None:
        """Make it the identity."""
        torch.nn.init.eye_(self.weight)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Project states of any float type; the result is in float32."""
        with torch.autocast(device_type=state.device.type, enabled=False):
            return torch.nn.functional.linear(state.float(), self.weight.float())
