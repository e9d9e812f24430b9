"""Running a batch through a backbone's layers from which rows depart at exits, so that no further layer sees them."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .backbone import LayerStandIn, apply_norm, layers_of, view

# From the exit, its rows' states (rows, length, hidden) behind the final norm, and their numbers in the batch (rows,)
# to a mask (rows,) of those that go on.
Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class Travellers:
    """The rows of a batch that are still on their way.

    Args:
        batch: rows at the start.
    """

    def __init__(self, batch: int, device: torch.device):
        self.batch = batch
        self.rows = torch.arange(batch, device=device)
        self.layers = torch.zeros(batch, dtype=torch.long, device=device)

    def narrow(self, value):
        """Of a layer's argument, the part of the rows that are left; what has no row for each is left alone."""
        if isinstance(value, torch.Tensor):
            return value[self.rows] if value.ndim > 1 and value.shape[0] == self.batch else value
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.narrow, value))
        return value


class DepartingLayer(LayerStandIn):
    """Calls its layer on the rows that are left, counts it for them, and lets rows depart behind it."""

    def __init__(self, layer: nn.Module, travellers: Travellers, depart: Callable[[torch.Tensor], torch.Tensor] | None):
        super().__init__(layer)
        self._travellers = travellers
        self._depart = depart

    def forward(self, hidden_states, *args, **kwargs):
        travellers = self._travellers
        if len(travellers.rows) < travellers.batch:
            args = tuple(map(travellers.narrow, args))
            kwargs = {name: travellers.narrow(value) for name, value in kwargs.items()}
        output = self.layer(hidden_states, *args, **kwargs)
        travellers.layers[travellers.rows] += 1
        if self._depart is None:
            return output
        state = output[0] if isinstance(output, tuple) else output
        state = state[self._depart(state)]
        return (state, *output[1:]) if isinstance(output, tuple) else state


class AllDeparted(Exception):
    """Ends the pass of a backbone whose batch is empty."""


def run_departing(
    backbone: nn.Module, stack: str, norm: str, exits: Sequence[int], visit: Visit, batch: int, **inputs
) -> torch.Tensor:
    """Visit state(n) at each exit n with the rows that are left, in one pass that ends when none is.

    Args:
        exits: layers, ascending; at the last one `visit` is called and its answer is not read.
        batch: rows of the inputs.
        inputs: what the backbone's forward takes.

    Returns:
        (batch,) layers that ran for each row.
    """
    layers = layers_of(backbone, stack)
    travellers = Travellers(batch, next(backbone.parameters()).device)

    def departure(n: int):
        def depart(state: torch.Tensor) -> torch.Tensor:
            stay = visit(n, apply_norm(backbone, norm, state), travellers.rows)
            travellers.rows = travellers.rows[stay]
            if not len(travellers.rows):
                raise AllDeparted
            return stay

        return depart if n in exits[:-1] else None

    chosen = [DepartingLayer(layer, travellers, departure(n)) for n, layer in enumerate(layers[: exits[-1]], start=1)]
    try:
        state = view(backbone, stack, chosen)(**inputs).last_hidden_state
        visit(exits[-1], state, travellers.rows)
    except AllDeparted:
        pass
    return travellers.layers


__all__ = ["AllDeparted", "DepartingLayer", "Travellers", "run_departing"]
