"""What an exit may do with the states of its tokens: weigh them, and apply a matrix."""

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


class ExitGate(torch.nn.Module):
    """The logarithm of each token's weight in the mean of one exit, up to a constant: (..., hidden) to (...), float32.

    With the weights softmax(state v), pooling is attention with one learned query v (Yang et al. 2016, "Hierarchical
    attention networks for document classification", equation 6, without its hidden layer). Layers end with a norm, so
    that all tokens are about as long, and in a plain mean the [SEP] of a text counts as much as its subject. Deep
    layers have made up for this, shallow ones have not. v = 0 gives the plain mean.

    It is no `torch.nn.Linear`, so that what wraps each of those, as PEFT's `all-linear` does, leaves it alone.

    Args:
        hidden_size: dimensions of a state.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size))

    @property
    def is_neutral(self) -> bool:
        """Whether all tokens weigh the same."""
        return not self.weight.any()

    def reset(self) -> None:
        """Let all tokens weigh the same."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Logits of token states of any float type; the result is in float32."""
        with torch.autocast(device_type=state.device.type, enabled=False):
            return torch.nn.functional.linear(state.float(), self.weight.float()).squeeze(-1)
