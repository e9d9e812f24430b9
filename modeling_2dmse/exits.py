"""From the token states of an exit to its pooled states: gates, pooling, projections."""

from collections.abc import Sequence
from typing import cast

import torch

from .configuration_2dmse import TwoDMSEConfig
from .packing import Packing, packed_weights, pool_packed
from .pooling import pool, token_weights
from .projection import ExitGate, ExitProjection


class ExitsMixin:
    """The exits of `TwoDMSEModel`."""

    config: TwoDMSEConfig
    exit_projections: torch.nn.ModuleList | None
    exit_gates: torch.nn.ModuleList | None

    def add_exit_projections(self) -> None:
        """Give each exit its own square matrix, applied to its state and initially the identity.

        `trainer.projections.fit_exit_projections` fits the matrices in closed form. If the model has exit projections
        already, nothing changes.
        """
        if self.exit_projections is None:
            self.exit_projections = self._place(self._new_projections())
            self.config.exit_projections = True

    def add_exit_gates(self) -> None:
        """Let each exit weigh the tokens of a text itself; initially they weigh the same.

        `trainer.gates.fit_exit_gates` trains the gates. If the model has exit gates already, nothing changes.

        Raises:
            ValueError: the model pools by `cls` or `lasttoken`, which take one token.
        """
        if self.exit_gates is None:
            self.exit_gates = self._place(self._new_gates())
            self.config.exit_gates = True

    def _new_projections(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList(ExitProjection(self.config.hidden_size) for _ in range(self.config.num_layers))

    def _new_gates(self) -> torch.nn.ModuleList:
        self.config.check_gates(self.config.pooling)  # which may have been set after the configuration was made
        return torch.nn.ModuleList(ExitGate(self.config.hidden_size) for _ in range(self.config.num_layers))

    def _place(self, modules: torch.nn.ModuleList) -> torch.nn.ModuleList:
        """New modules that change nothing, where the model's weights are."""
        for module in modules.to(self.input_device, self.dtype):  # type: ignore[attr-defined]
            cast("ExitProjection | ExitGate", module).reset()
        return modules

    def _pool(
        self,
        layers: Sequence[int],
        states: Sequence[torch.Tensor],
        attention_mask: torch.Tensor,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """(L, texts, hidden): the pooled and projected states of exits, from the states of their tokens."""
        pooled = []
        for state, n in zip(states, layers, strict=True):
            weights = self._token_weights(state, n, attention_mask, packing)
            if packing is None:
                vectors = pool(state, attention_mask, self.config.pooling, weights)
            else:
                vectors = pool_packed(state[0], packing, self.config.pooling, weights)
            pooled.append(self._project(vectors, n))
        return torch.stack(pooled)

    def _exit_states(self, state: torch.Tensor, num_layers: int, attention_mask: torch.Tensor) -> torch.Tensor:
        """The states of tokens as other clients pool them: each times its weight, and projected."""
        weights = self._token_weights(state, num_layers, attention_mask)
        if weights is None:
            return self._project(state, num_layers)
        return self._project(state.float() * weights.unsqueeze(-1), num_layers).to(state.dtype)

    def _token_weights(
        self, state: torch.Tensor, num_layers: int, attention_mask: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor | None:
        if self.exit_gates is None:
            return None
        logits = self.exit_gates[num_layers - 1](state)
        if packing is None:
            return token_weights(logits, attention_mask, self.config.pooling)
        return packed_weights(logits[0], packing, self.config.pooling)

    def _project(self, state: torch.Tensor, num_layers: int) -> torch.Tensor:
        if self.exit_projections is None:
            return state
        return self.exit_projections[num_layers - 1](state).to(state.dtype)
