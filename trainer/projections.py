"""Fitting the exit projections of an elastic model, in closed form, to texts without labels."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.batching import check_texts
from modeling_2dmse.encoding import to_embeddings
from modeling_2dmse.projection import ExitProjection

# Texts that are encoded at a time: the states of all layers are in memory for that many.
_PIECE = 2048


def fit_exit_projections(
    encoder: TwoDMSEModel,
    texts: Sequence[str],
    ridge: float = 0.02,
    layers: Sequence[int] | None = None,
    targets: torch.Tensor | None = None,
    keep_states: bool = False,
    **encode: Any,
) -> torch.Tensor | None:
    """Fit a projection for each exit, so that its first dimensions reproduce the embeddings of the full size.

    Let T be the embeddings of the full size and X_n the pooled states after n layers, one row per text. V are the
    eigenvectors of T^T T, strongest first: of all rotations, T V has the best first d columns for every d (PCA without
    centering). The last exit is multiplied by V, which does not change similarities at the full size. If it has a
    projection that does change them (the Dense module of an imported model), T and the last exit include it. Exit n < N
    is multiplied by

        W_n = argmin |X_n W - T V|^2 + r |W|^2 = (X_n^T X_n + r I)^-1 X_n^T T V

    where r is `ridge` times the mean diagonal of X_n^T X_n.

    If the encoder has no projections, it gets new ones; existing projections are fitted again. If all exits are fitted
    and the encoder pools by `cls` or `lasttoken`, those below the last one take the mean from now on.
    Fit in float32: states in bfloat16 lose the small differences that a shallow exit's projection reads (lab notes,
    2026-11-28).

    Args:
        encoder: the model, which is changed in place.
        texts: some thousands of texts of the kind that will be embedded; no labels are needed.
        ridge: strength of the regularization.
        layers: the exits to fit; all by default. Without the last exit, T V is its present output.
        targets: (len(texts), hidden), what every exit, the last one too, is fitted to instead of T V: the rotated
            embeddings of another teacher.
        keep_states: return the states of the texts, which otherwise do not stay in memory.
        **encode: `max_length`, `batch_size` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Returns:
        with `keep_states`, (N, len(texts), hidden), float32, on the CPU: what `encode_states` would give after the fit,
        except that the last state has unit norm unless there are targets. Otherwise None.

    Raises:
        ValueError: there are no texts, an item is not a string, `targets` has another shape, or the projections are
            offloaded.
    """
    texts, _ = check_texts(texts)
    if not texts:
        raise ValueError("texts: there are none; give some thousands of texts of the kind that will be embedded")
    if targets is not None and targets.shape != (len(texts), encoder.config.hidden_size):
        wanted = (len(texts), encoder.config.hidden_size)
        raise ValueError(f"targets: the shape is {tuple(targets.shape)}, but {wanted} is needed")
    encoder.add_exit_projections()
    if layers is None:
        encoder.pool_all_tokens()
    check_at_hand(encoder.exit_projections, "exit projections")
    projections = cast(list[ExitProjection], list(encoder.exit_projections or ()))
    last = encoder.num_layers
    layers = range(1, last + 1) if layers is None else layers
    weights = {n: projections[n - 1].weight for n in layers}
    for n in layers:
        if n < last or targets is not None or _is_rotation(weights[n]):
            projections[n - 1].reset()
    grams, crosses, kept = _moments(encoder, texts, targets, keep_states, encode)
    rotation = torch.eye(encoder.config.hidden_size, dtype=torch.float64)
    if last in weights and targets is None:
        width = full_dim(encoder)  # a rotation of more dimensions would mix some that are there with some that are not
        rotation[:width, :width] = torch.linalg.eigh(crosses[-1][:width, :width])[1].flip(1)
        weight = weights.pop(last)
        weight.data.copy_(rotation.T @ weight.detach().double().cpu())
        for states in kept:
            states[-1] = states[-1] @ rotation.float()
    for n, weight in weights.items():
        gram = grams[n - 1]
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weight.data.copy_(torch.linalg.solve(gram, crosses[n - 1] @ rotation).T)
        for states in kept:
            states[n - 1] = torch.nn.functional.linear(states[n - 1], weight.detach().float().cpu())
    return torch.cat(kept, dim=1) if keep_states else None


def full_dim(encoder: TwoDMSEModel) -> int:
    """Dimensions of the full size: the hidden size, or fewer if an imported model has a Dense module to fewer."""
    if encoder.exit_projections is None:
        return encoder.config.hidden_size
    weight = cast(list[ExitProjection], list(encoder.exit_projections))[-1].weight
    return int(weight.any(dim=1).nonzero().max()) + 1


def check_at_hand(modules: torch.nn.Module | None, name: str) -> None:
    """ValueError if modules of the exits cannot be changed, because accelerate has offloaded them."""
    if any(weight.is_meta for weight in cast(torch.nn.Module, modules).parameters()):
        raise ValueError(
            f"encoder: its {name} are offloaded (on the meta device); fit them before offloading the model"
        )


def _is_rotation(weight: torch.Tensor) -> bool:
    square = weight.detach().float() @ weight.detach().float().T
    return torch.allclose(square, torch.eye(len(square), device=square.device), atol=1e-3)


def _moments(
    encoder: TwoDMSEModel, texts: list[str], targets: torch.Tensor | None, keep: bool, encode: dict
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """X_n^T X_n and X_n^T T for each n, (N, hidden, hidden), float64; and X_n in pieces, (N, texts, hidden), to keep.

    T is `targets`, or the embeddings of the full size, which then also stand for the last X_n.
    """
    shape = (encoder.num_layers, encoder.config.hidden_size, encoder.config.hidden_size)
    grams, crosses = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    for start in range(0, len(texts), _PIECE):
        states = encoder.encode_states(texts[start : start + _PIECE], **encode)
        if targets is None:
            target = to_embeddings(states[-1], encoder.config.hidden_size, encoder.config.similarity)
            states = torch.cat((states[:-1], target[None]))
        else:
            target = targets[start : start + _PIECE].to(states)
        grams += (states.mT @ states).double()
        crosses += (states.mT @ target).double()
        if keep:
            kept.append(states.clone())  # a normal tensor, which may be changed
    return grams, crosses, kept
