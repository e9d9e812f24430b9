"""The matrix that an exit may have behind its state."""

import torch


class ExitProjection(torch.nn.Linear):
    """
    The square matrix of one exit, applied in float32: (..., hidden) to (..., hidden), without bias.

    It is linear and poolings are weighted means, so that a text may be pooled first (cheap) or last (what stock
    sentence-transformers does with the token states).
    """

    def __init__(self, hidden_size: int, **kwargs):
        super().__init__(hidden_size, hidden_size, bias=False, **kwargs)

    def reset(self) -> None:
        """Make it the identity."""
        torch.nn.init.eye_(self.weight)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=state.device.type, enabled=False):
            return torch.nn.functional.linear(state.float(), self.weight.float())
