"""Training the gates of exits alone, on token states that are computed once."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.batching import check_texts, even_groups
from modeling_2dmse.encoding import to_embeddings
from modeling_2dmse.pooling import pool, token_weights
from modeling_2dmse.projection import ExitGate, ExitProjection
from modeling_2dmse.running import inference_twin
from modeling_2dmse.tokens import Tokens, tokenize

from .projections import check_at_hand, fit_exit_projections
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
) -> None:
    """Train the gate of each exit below the last one, so that similarities at its sizes are those of the targets.

    A gate says how much each token of a text counts at its exit (`ExitGate`). It is trained together with a matrix
    P after the exit's projection, which starts as the identity, on what `refine_exit_projections` trains P on. P is
    thrown away: fit the projections of these exits again afterwards, which the new weights of tokens do not suit
    (`fit_exit_projections`).

    The gate of the last exit stays as it is, so that the full size does.

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
    layers = sorted({size.num_layers for size in sizes} - {encoder.num_layers})
    if not layers:
        return
    wanted = to_embeddings(targets, targets.shape[1], similarity).to(device)
    scales, batches = _token_states(encoder, texts, wanted, layers, max_length)
    for place, n in enumerate(layers):
        dims = sorted({size.dim for size in sizes if size.num_layers == n})
        _train(encoder, n, place, scales[place], dims, batches, steps, torch.Generator().manual_seed(seed))


def fit_exits(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    sizes: Sequence[Size],
    gates: bool = False,
    targets: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    keep_states: bool = False,
    **encode: Any,
) -> torch.Tensor | None:
    """Fit the projections of all exits and, with `gates`, the gates of those below the last one.

    The gates are fitted first, from projections for the texts that they are trained on.

    Args:
        encoder: the model, which is changed in place.
        texts: as for `fit_exit_projections`; with gates in random order.
        sizes: those that gates are fitted for.
        gates: whether to fit gates too.
        targets: as for `fit_exit_projections`.
        layers: the exits whose projections are fitted; without gates.
        seed: of the gates.
        keep_states: return the states of the texts after the fit, as `fit_exit_projections` does.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Returns:
        with `keep_states`, (N, len(texts), hidden), float32, on the CPU; otherwise None.
    """
    if gates:
        encoder.add_exit_gates()
        longest = encode.get("max_length")
        first = texts[: _count_used(_tokenize(encoder, check_texts(texts)[0], longest))]
        wanted = None if targets is None else targets[: len(first)]
        states = fit_exit_projections(encoder, first, targets=wanted, keep_states=wanted is None, **encode)
        wanted = cast(torch.Tensor, states)[-1] if wanted is None else wanted
        fit_exit_gates(encoder, first, wanted, sizes, seed=seed, max_length=longest)
    return fit_exit_projections(encoder, texts, targets=targets, layers=layers, keep_states=keep_states, **encode)


def keep_last_gate(encoder: TwoDMSEModel, wanted: bool = False) -> None:
    """Leave the gate of the last exit out of training if it is neutral, so that the full size stays a plain encoder.

    Raises:
        ValueError: gates are wanted, and there are none.
    """
    if wanted and encoder.exit_gates is None:
        raise ValueError(
            "exit_gates: they are fitted with new exit projections; add exit_projections, to a model that "
            "has none, or call fit_exit_gates before"
        )
    gates = cast(list[ExitGate], list(encoder.exit_gates or ()))
    if gates and gates[-1].is_neutral:
        gates[-1].requires_grad_(False)


@torch.no_grad()
def _token_states(
    encoder: TwoDMSEModel, texts: Sequence[str], targets: torch.Tensor, layers: Sequence[int], max_length: int | None
) -> tuple[list[float], list[_Batch]]:
    """The scale of each exit, and the batches."""
    tokens, model = _tokenize(encoder, texts, max_length), inference_twin(encoder)
    used = _count_used(tokens)
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


def _tokenize(encoder: TwoDMSEModel, texts: Sequence[str], max_length: int | None) -> Tokens:
    return tokenize(encoder.tokenizer, list(texts), min(max_length or encoder.max_length, encoder.max_length))


def _count_used(tokens: Tokens) -> int:
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
    """Train the gate of one exit, whose states, divided by `scale`, have a place among those of each batch."""
    weight = cast(list[ExitProjection], list(encoder.exit_projections or ()))[num_layers - 1].weight.detach().float()
    weight = weight * scale
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
