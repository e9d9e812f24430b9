"""What is done to the exits of a model alone, before or after its layers are trained."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.projection import ExitGate

from .gates import fit_exit_gates
from .refining import dims_of_last_exit, join_targets, refine_exit_projections, rotate_last_exit


def keep_last_gate(encoder: TwoDMSEModel) -> None:
    """Leave the gate of the last exit out of training if it is neutral, so that the full size stays a plain encoder."""
    gates = cast(list[ExitGate], list(encoder.exit_gates or ()))
    if gates and gates[-1].is_neutral:
        gates[-1].requires_grad_(False)


def refine_exits(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    targets: torch.Tensor,
    sizes: Sequence[Size],
    gates: bool = False,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    states: torch.Tensor | None = None,
    pairs: Sequence[tuple[int, int]] = (),
    **encode: Any,
) -> None:
    """Train the projections of exits, and their gates together with them.

    Gates are trained on the first texts only, and not on pairs. If there are more texts, or pairs, projections are
    trained once more, on all of them.

    Args:
        encoder: the model with exit projections, which is changed in place.
        texts: as for `refine_exit_projections`; with gates in random order.
        targets: (len(texts), any dim), the embeddings whose similarities the sizes learn.
        sizes: the sizes to train.
        gates: whether a model that has no gates gets them.
        seed: seed of the batches.
        layers: the exits to train, by default all but the last. Only those that `sizes` name are trained.
        states: as for `refine_exit_projections`, which saves computing them if there are no gates.
        pairs: as for `refine_exit_projections`.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode_states`.
    """
    if gates or encoder.exit_gates is not None:
        longest = encode.get("max_length")
        used = fit_exit_gates(encoder, texts, targets, sizes, seed=seed, max_length=longest, layers=layers)
        if used == len(texts) and not pairs:
            return
        states = None  # they were those without these gates
    options: dict[str, Any] = {"seed": seed, "states": states, "layers": layers, "pairs": pairs}
    refine_exit_projections(encoder, texts, targets, sizes, **options, **encode)


def refine_trained(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    sizes: Sequence[Size],
    teacher: torch.Tensor | None = None,
    gates: bool = False,
    seed: int = 0,
    pairs: Sequence[tuple[int, int]] = (),
    **encode: Any,
) -> None:
    """Refine the exits of a trained model below its last one, towards its own full size and its teacher.

    The mean similarity of both is a better target than that of either (docs/lab-notes.md). The last exit is rotated
    towards its own full size, so that it can be cut to the dims of the other sizes. Gates that the layers were trained
    with stay as they are: trained once more here, they find less (docs/lab-notes.md).

    Args:
        encoder: the trained model with exit projections, which is changed in place.
        texts: some thousands of different texts of the kind that will be embedded; with gates in random order.
        sizes: the sizes to train.
        teacher: (len(texts), any dim), embeddings of the teacher; None for none.
        gates: whether a model that has no gates gets them.
        seed: seed of the batches.
        pairs: as for `refine_exit_projections`.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode_states`.
    """
    adds_gates = gates and encoder.exit_gates is None
    layers = sorted({size.num_layers for size in sizes if not adds_gates} | {encoder.num_layers})
    *below, last = encoder.encode_states(list(texts), layers, **encode)
    targets = join_targets([last] if teacher is None else [last, teacher], encoder.config.similarity)
    if adds_gates:
        refine_exits(encoder, texts, targets, sizes, gates, seed=seed, pairs=pairs, **encode)
    elif below:
        options: dict[str, Any] = {"seed": seed, "states": torch.stack(below), "layers": layers[:-1], "pairs": pairs}
        refine_exit_projections(encoder, texts, targets, sizes, **options)
    rotate_last_exit(encoder, last, last, dims_of_last_exit(encoder, sizes), seed=seed)
