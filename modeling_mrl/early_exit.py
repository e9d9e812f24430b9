"""Running a batch through a backbone's layers while rows leave at exits, so that no deeper layer runs for them."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .backbone import LayerStandIn, apply_norm, layers_of, view
from .running import execution_device

# Called with the exit, the states (rows, length, hidden) after the final norm of the rows that are left there, and
# their numbers in the batch, (rows,). Returns a mask (rows,) of the rows that continue.
Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class ActiveRows:
    """The rows of a batch that have not left yet.

    Args:
        batch: rows at the start.
        device: of the inputs.
    """

    def __init__(self, batch: int, device: torch.device):
        self.batch = batch
        self.rows = torch.arange(batch, device=device)
        self.layers = torch.zeros(batch, dtype=torch.long, device=device)

    def narrow(self, value):
        """An argument of a layer for only the rows that are left; what does not have one entry per row is kept."""
        if isinstance(value, torch.Tensor):
            return value[self.rows] if value.ndim > 1 and value.shape[0] == self.batch else value
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.narrow, value))
        return value


class ExitingLayer(LayerStandIn):
    """Calls its layer on the rows that are left, counts the layer for them, and lets rows leave after it.

    Args:
        layer: the layer.
        active: the rows that are left; narrowed by `leave`.
        leave: from the layer's state to a mask of the rows that continue; None if no row may leave here.
    """

    def __init__(self, layer: nn.Module, active: ActiveRows, leave: Callable[[torch.Tensor], torch.Tensor] | None):
        super().__init__(layer)
        self._active = active
        self._leave = leave

    def forward(self, hidden_states, *args, **kwargs):
        active = self._active
        if len(active.rows) < active.batch:
            args = tuple(map(active.narrow, args))
            kwargs = {name: active.narrow(value) for name, value in kwargs.items()}
        output = self.layer(hidden_states, *args, **kwargs)
        active.layers[active.rows] += 1
        if self._leave is None:
            return output
        state = output[0] if isinstance(output, tuple) else output
        state = state[self._leave(state)]
        return (state, *output[1:]) if isinstance(output, tuple) else state


class NoRowsLeft(Exception):
    """Ends the pass of a backbone when every row has left."""


def run_with_exits(
    backbone: nn.Module, stack: str, norm: str, exits: Sequence[int], visit: Visit, batch: int, **inputs
) -> torch.Tensor:
    """Visit state(n) at each exit n with the rows that are left, in one pass that ends when no row is left.

    Args:
        backbone: a text encoder.
        stack: path of its list of layers.
        norm: path of its final norm, `""` for none.
        exits: numbers of layers, ascending.
        visit: called at each exit; its result is ignored at the last one.
        batch: rows of the inputs.
        inputs: arguments of the backbone's forward.

    Returns:
        (batch,), the number of layers that ran for each row.
    """
    layers = layers_of(backbone, stack)
    active = ActiveRows(batch, execution_device(backbone))

    def leaving_at(n: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        def leave(state: torch.Tensor) -> torch.Tensor:
            stay = visit(n, apply_norm(backbone, norm, state), active.rows)
            active.rows = active.rows[stay]
            if not len(active.rows):
                raise NoRowsLeft
            return stay

        return leave if n in exits[:-1] else None

    chosen = [ExitingLayer(layer, active, leaving_at(n)) for n, layer in enumerate(layers[: exits[-1]], start=1)]
    try:
        state = view(backbone, stack, chosen)(**inputs).last_hidden_state
        visit(exits[-1], state, active.rows)
    except NoRowsLeft:
        pass
    return active.layers


__all__ = ["ActiveRows", "ExitingLayer", "NoRowsLeft", "run_with_exits"]
