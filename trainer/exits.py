"""What is done to the exits of a model before and after it is trained."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.batching import check_texts
from modeling_2dmse.projection import ExitGate

from .gates import count_used, fit_exit_gates, tokenize_texts
from .projections import fit_exit_projections
from .refining import dims_of_last_exit, join_targets, refine_exit_projections, rotate_last_exit


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
        first = texts[: count_used(tokenize_texts(encoder, check_texts(texts)[0], longest))]
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


def refine_exits(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    targets: torch.Tensor,
    sizes: Sequence[Size],
    seed: int = 0,
    layers: Sequence[int] | None = None,
    **encode: Any,
) -> None:
    """Train the projections of exits and, if the model has gates, these together with them.

    The arguments are those of `refine_exit_projections` and `fit_exit_gates`.
    """
    if encoder.exit_gates is None:
        refine_exit_projections(encoder, texts, targets, sizes, seed=seed, layers=layers, **encode)
    else:
        longest = encode.get("max_length")
        fit_exit_gates(encoder, texts, targets, sizes, seed=seed, max_length=longest, layers=layers)


def refine_trained(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    sizes: Sequence[Size],
    teacher: torch.Tensor | None = None,
    seed: int = 0,
    **encode: Any,
) -> None:
    """Refine the exits of a trained model below its last one, towards its own full size and its teacher.

    The mean similarity of both is a better target than that of either (docs/lab-notes.md). With gates, these and the
    projections are trained together, on the first texts. The last exit is rotated towards its own full size, so that
    it can be cut to the dims of the other sizes.

    Args:
        encoder: the trained model with exit projections, which is changed in place.
        texts: some thousands of different texts of the kind that will be embedded; with gates in random order.
        sizes: the sizes to train.
        teacher: (len(texts), any dim), embeddings of the teacher; None for none.
        seed: seed of the batches.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode_states`.
    """
    gated = encoder.exit_gates is not None
    layers = sorted({size.num_layers for size in sizes if not gated} | {encoder.num_layers})
    *below, last = encoder.encode_states(list(texts), layers, **encode)
    targets = join_targets([last] if teacher is None else [last, teacher], encoder.config.similarity)
    if gated:
        refine_exits(encoder, texts, targets, sizes, seed=seed, **encode)
    elif below:
        states = torch.stack(below)
        refine_exit_projections(encoder, texts, targets, sizes, seed=seed, states=states, layers=layers[:-1])
    rotate_last_exit(encoder, last, last, dims_of_last_exit(encoder, sizes), seed=seed)
