"""From the token states of an exit to its pooled states: gates, pooling, projections."""

from collections.abc import Sequence
from typing import cast

import torch

from .configuration_2dmse import WEIGHED_POOLING_MODES, TwoDMSEConfig
from .packing import Packing, packed_weights, pool_packed
from .pooling import pool, token_weights
from .projection import ExitGate, ExitProjection


class ExitsMixin:
    """The exits of `TwoDMSEModel`."""

    config: TwoDMSEConfig
    exit_projections: torch.nn.ModuleList | None
    exit_gates: torch.nn.ModuleList | None

    @property
    def is_gated(self) -> bool:
        """Whether the last exit weighs the tokens of a text."""
        return self.exit_gates is not None and not cast(ExitGate, self.exit_gates[-1]).is_neutral

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
        `pool_all_tokens` is called.
        """
        self.pool_all_tokens()
        if self.exit_gates is None:
            self.exit_gates = self._place(self._new_gates())
            self.config.exit_gates = True

    def pool_all_tokens(self) -> None:
        """If the model pools by `cls` or `lasttoken`, let the exits below the last one take the mean instead.

        In few layers, one token has gathered little of the others.
        """
        config = self.config
        if config.pooling not in WEIGHED_POOLING_MODES and config.exit_poolings is None:
            config.exit_poolings = ["mean"] * (config.num_layers - 1) + [config.pooling]

    def remove_exit_gates(self) -> None:
        """Let all tokens weigh the same."""
        self.exit_gates, self.config.exit_gates = None, False

    def _new_projections(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList(ExitProjection(self.config.hidden_size) for _ in range(self.config.num_layers))

    def _new_gates(self) -> torch.nn.ModuleList:
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
            weights, mode = self._token_weights(state, n, attention_mask, packing), self.config.pooling_of(n)
            if packing is None:
                vectors = pool(state, attention_mask, mode, weights)
            else:
                vectors = pool_packed(state[0], packing, mode, weights)
            pooled.append(self._project(vectors, n))
        return torch.stack(pooled)

    def _exit_states(self, state: torch.Tensor, num_layers: int, attention_mask: torch.Tensor) -> torch.Tensor:
        """The states of tokens as other clients pool them: each times its weight, and projected.

        Other clients know one pooling. If the exit has another, each token gets the pooled state, and any pooling of
        them is right.
        """
        weights, mode = self._token_weights(state, num_layers, attention_mask), self.config.pooling_of(num_layers)
        if mode != self.config.pooling:
            pooled = self._project(pool(state, attention_mask, mode, weights), num_layers)
            return pooled.to(state.dtype).unsqueeze(1).expand(-1, state.shape[1], -1)
        if weights is None:
            return self._project(state, num_layers)
        return self._project(state.float() * weights.unsqueeze(-1), num_layers).to(state.dtype)

    def _token_weights(
        self, state: torch.Tensor, num_layers: int, attention_mask: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor | None:
        mode = self.config.pooling_of(num_layers)
        if self.exit_gates is None or mode not in WEIGHED_POOLING_MODES:
            return None
        logits = self.exit_gates[num_layers - 1](state)
        if packing is None:
            return token_weights(logits, attention_mask, mode)
        return packed_weights(logits[0], packing, mode)

    def _project(self, state: torch.Tensor, num_layers: int) -> torch.Tensor:
        if self.exit_projections is None:
            return state
        return self.exit_projections[num_layers - 1](state).to(state.dtype)
