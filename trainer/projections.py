"""Fitting the projections of an elastic model's exits, in closed form, to texts without labels."""

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.encoding import check_texts

# Texts that are encoded at a time: states of all layers are held for so many.
_PIECE = 2048


def fit_exit_projections(
    encoder: TwoDMSEModel, texts: Sequence[str], ridge: float = 0.02, layers: Sequence[int] | None = None, **encode
) -> None:
    """
    Let each exit say, in as few dimensions as possible, what the full size says of the texts.

    T are the embeddings of the full size, X_n the pooled states after n layers, one row a text. V are the eigenvectors
    of T^T T, strongest first, so that the first d columns of T V are the best d of all rotations' (PCA about the
    origin). The last exit is multiplied by V, which leaves cosines at the full size as they are; exit n < N by

        W_n = argmin |X_n W - T V|^2 + r |W|^2 = (X_n^T X_n + r I)^-1 X_n^T T V

    with r = ridge times the mean diagonal of X_n^T X_n.

    The encoder gets new projections where it has none; ones that it has are fitted anew.

    Args:
        texts: some thousands, of the kind that will be embedded; no labels are needed.
        ridge: of the regression.
        layers: the exits to fit, all when left out. Without the last one, T V is what the last exit gives as it is.
        encode: `max_length`, `batch_size`, `show_progress_bar` of `TwoDMSEModel.encode_states`.
    """
    texts, _ = check_texts(texts)
    if not texts:
        raise ValueError("texts: there are none; give some thousands of the kind that will be embedded")
    encoder.add_exit_projections()
    last = encoder.num_layers
    layers = range(1, last + 1) if layers is None else layers
    weights = {n: encoder.exit_projections[n - 1].weight for n in layers}
    for n in layers:
        encoder.exit_projections[n - 1].reset()
    grams, crosses = _moments(encoder, texts, encode)
    rotation = torch.eye(encoder.config.hidden_size, dtype=torch.float64)
    if last in weights:
        rotation = torch.linalg.eigh(crosses[-1])[1].flip(1)
        weights.pop(last).data.copy_(rotation.T)
    for n, weight in weights.items():
        gram = grams[n - 1]
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weight.data.copy_(torch.linalg.solve(gram, crosses[n - 1] @ rotation).T)


def _moments(encoder: TwoDMSEModel, texts: list[str], encode: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """X_n^T X_n and X_n^T T for each n, with T for the last X_n; (N, hidden, hidden), float64."""
    shape = (encoder.num_layers, encoder.config.hidden_size, encoder.config.hidden_size)
    grams, crosses = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for start in range(0, len(texts), _PIECE):
        states = encoder.encode_states(texts[start : start + _PIECE], **encode)
        target = normalize(states[-1], dim=-1)
        states = torch.cat((states[:-1], target[None]))
        grams += (states.mT @ states).double()
        crosses += (states.mT @ target).double()
    return grams, crosses
