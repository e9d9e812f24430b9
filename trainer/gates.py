"""Training the gates and projections of exits alone, on token states that are computed once."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.batching import even_groups
from modeling_2dmse.configuration_2dmse import WEIGHED_POOLING_MODES
from modeling_2dmse.encoding import to_embeddings
from modeling_2dmse.pooling import pool, token_weights
from modeling_2dmse.projection import ExitGate, ExitProjection
from modeling_2dmse.running import inference_twin
from modeling_2dmse.tokens import Tokens, tokenize

from .projections import check_at_hand
from .refining import divergence, minimize

STEPS = 200
# Most tokens whose states are kept: 2 bytes times the width, for each exit.
_TOKENS = 250_000
# Texts of a batch, which have similar lengths, and of a step; and the most tokens of a batch.
_BATCH, _TEXTS, _BATCH_TOKENS = 64, 1536, 16_384
# The spread of states that are all 0.
_LEAST = torch.finfo(torch.float32).tiny


class _Batch(NamedTuple):
    """Some texts of similar length.

    Attributes:
        states: (texts, length, hidden) for each exit, divided by the exit's scale, in float16.
        mask: (texts, length), 1 for a real token.
        targets: (texts, any dim), of unit norm for `cosine`.
    """

    states: list[torch.Tensor]
    mask: torch.Tensor
    targets: torch.Tensor


def fit_exit_gates(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    targets: torch.Tensor,
    sizes: Sequence[Size],
    steps: int = STEPS,
    seed: int = 0,
    max_length: int | None = None,
    layers: Sequence[int] | None = None,
) -> int:
    """Train the gate and the projection of each exit, so that similarities at its sizes are those of the targets.

    A gate says how much each token of a text counts at its exit (`ExitGate`). It is trained together with a matrix
    P that starts as the identity, on what `refine_exit_projections` trains P on, and the exit's projection is
    multiplied by P. By default the exit of the last layer is left alone: it is the full size's.

    Args:
        encoder: the model, with exit projections that are fitted, which is changed in place. If it has no gates, it
            gets them.
        texts: some thousands of different texts of the kind that will be embedded, in random order. The first ones, of
            250,000 tokens together, are used.
        targets: (len(texts), any dim), the embeddings whose similarities the sizes learn.
        sizes: the sizes to train.
        steps: number of steps for each exit.
        seed: seed of the batches.
        max_length: in tokens; longer texts are truncated. Default: what the model reads.
        layers: the exits to train, by default all but the last. Only those that `sizes` name and that pool all tokens
            are trained.

    Returns:
        how many texts were used; 0 if there is no exit to train.

    Raises:
        ValueError: the model has no exit projections, its exits are offloaded, or there are not as many targets as
            texts.
    """
    if encoder.exit_projections is None:
        raise ValueError("encoder: it has no exit projections; call fit_exit_projections first")
    check_at_hand(encoder.exit_projections, "exit projections")
    if len(texts) != len(targets):
        raise ValueError(f"targets: there are {len(targets)} for {len(texts)} texts")
    encoder.add_exit_gates()
    check_at_hand(encoder.exit_gates, "exit gates")
    similarity, device = encoder.config.similarity, encoder.input_device
    exits = range(1, encoder.num_layers) if layers is None else layers
    named = sorted({size.num_layers for size in sizes}.intersection(exits))
    layers = [n for n in named if encoder.config.pooling_of(n) in WEIGHED_POOLING_MODES]
    if not layers:
        return 0
    wanted = to_embeddings(targets, targets.shape[1], similarity).to(device)
    scales, batches = _token_states(encoder, texts, wanted, layers, max_length)
    for place, n in enumerate(layers):
        dims = sorted({size.dim for size in sizes if size.num_layers == n})
        _train(encoder, n, place, scales[place], dims, batches, steps, torch.Generator().manual_seed(seed))
    return sum(len(batch.targets) for batch in batches)


@torch.no_grad()
def _token_states(
    encoder: TwoDMSEModel, texts: Sequence[str], targets: torch.Tensor, layers: Sequence[int], max_length: int | None
) -> tuple[list[float], list[_Batch]]:
    """The scale of each exit, and the batches."""
    tokens, model = tokenize_texts(encoder, texts, max_length), inference_twin(encoder)
    used = count_used(tokens)
    scales: list[float] = []
    batches = []
    groups = even_groups(tokens.lengths[:used].tolist(), _BATCH)
    parts = [np.array_split(rows, -(-len(rows) * longest // _BATCH_TOKENS)) for rows, longest in groups]
    for rows in itertools.chain.from_iterable(parts):
        inputs = tokens.take(rows).padded(targets.device)
        states = cast(TwoDMSEModel, model).token_states(layers, inputs)
        scales = scales or [_scale(state) for state in states]
        halved = [_halved(state.float() / scale) for state, scale in zip(states, scales, strict=True)]
        batches.append(_Batch(halved, inputs["attention_mask"], targets[torch.from_numpy(rows).to(targets.device)]))
    return scales, batches


def tokenize_texts(encoder: TwoDMSEModel, texts: Sequence[str], max_length: int | None) -> Tokens:
    return tokenize(encoder.tokenizer, list(texts), min(max_length or encoder.max_length, encoder.max_length))


def count_used(tokens: Tokens) -> int:
    """The number of texts whose token states are kept."""
    return max(2, int((np.cumsum(tokens.lengths) <= _TOKENS).sum()))


def _scale(state: torch.Tensor) -> float:
    """A power of two near the size of the values, so that dividing by it rounds nothing; 1 if they are all 0."""
    return 2.0 ** math.frexp(state.float().abs().mean().item())[1]


def _halved(state: torch.Tensor) -> torch.Tensor:
    """In float16, unless that overflows."""
    half = state.half()
    return half if half.isfinite().all() else state


def _train(
    encoder: TwoDMSEModel,
    num_layers: int,
    place: int,
    scale: float,
    dims: Sequence[int],
    batches: Sequence[_Batch],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train one exit, whose states, divided by `scale`, have a place among those of each batch."""
    projection = cast(list[ExitProjection], list(encoder.exit_projections or ()))[num_layers - 1].weight.detach()
    weight = projection.float() * scale
    gate = cast(list[ExitGate], list(encoder.exit_gates or ()))[num_layers - 1]
    exit_states = [batch.states[place].float() for batch in batches]
    # Adam's steps do not depend on the scale of what it trains, and states of other families are larger or smaller.
    spread = exit_states[len(batches) // 2].square().mean().sqrt().clamp(min=_LEAST)
    query = (gate.weight.detach()[0].float() * scale * spread).requires_grad_()
    matrix = torch.eye(encoder.config.hidden_size, device=query.device)[:, : dims[-1]].clone().requires_grad_()
    mode, similarity = encoder.config.pooling_of(num_layers), encoder.config.similarity
    texts = sum(len(batch.targets) for batch in batches)
    count = round(_TEXTS * len(batches) / max(texts, _TEXTS))  # batches of long texts have fewer of them

    def loss() -> torch.Tensor:
        chosen = torch.randperm(len(batches), generator=generator)[:count].tolist()
        pooled = []
        for state, mask in ((exit_states[i], batches[i].mask) for i in chosen):
            pooled.append(pool(state, mask, mode, token_weights(state @ (query / spread), mask, mode)))
        targets = torch.cat([batches[i].targets for i in chosen])
        # Texts of a batch are as long as each other: those that search are drawn from all.
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        output = torch.cat(pooled)[order] @ (weight.T @ matrix)
        return divergence([output], targets[order], [dims], similarity)

    minimize([query, matrix], loss, steps, f"Fitting the gate of layer {num_layers}")
    gate.weight.data.copy_((query.detach() / spread / scale)[None])
    projection[: dims[-1]] = (matrix.detach().double().T @ projection.double()).to(projection.dtype)
