"""What can be said of an elastic model without labels: how far each size agrees with a reference, on a corpus."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.encoding import to_embeddings

NEIGHBOURS = 10
# Pairs of texts whose similarities are compared.
_PAIRS = 20_000


def count_neighbours(texts: int) -> int:
    """How many of the nearest others of each of so many texts are compared."""
    return max(1, min(NEIGHBOURS, (texts - 1) // 2))


def reference_similarities(model: TwoDMSEModel, texts: Sequence[str], **encode: Any) -> torch.Tensor:
    """(n, n), float32: the similarities of the texts to each other at the model's full size.

    `encode` are those of `agreement`; as there, no prompt is put before the texts unless one is given.
    """
    options = {"prompt": "", **encode}
    vectors = torch.from_numpy(model.encode(list(texts), model.num_layers, model.config.hidden_size, **options))
    return vectors @ vectors.T


def agreement(
    model: TwoDMSEModel, texts: Sequence[str], sizes: Sequence[Size], reference: torch.Tensor, **encode: Any
) -> dict[str, Any]:
    """How far each size agrees with the reference about which texts are alike.

    Args:
        model: the model.
        texts: n different texts that it was not trained on, at least 3.
        sizes: the sizes, all from one encoding pass.
        reference: (n, n), of `reference_similarities`.
        **encode: `batch_size`, `max_length`, `prompt` and `show_progress_bar` of `TwoDMSEModel.encode_states`.

    Returns:
        `{"n": texts, "overlap@10": {"1x32": ...}, "spearman": {"1x32": ...}}`. The overlap is the share of each text's
        10 nearest others by the reference that are among its 10 nearest others at the size, mean over texts; with fewer
        than 20 other texts, the nearest half of them is compared. Spearman's correlation is that of the similarities of
        at most 20,000 pairs of texts.
    """
    layers = sorted({size.num_layers for size in sizes})
    states = dict(zip(layers, model.encode_states(list(texts), layers, **encode), strict=True))
    neighbours = count_neighbours(len(texts))
    nearest, rows = _nearest(reference, neighbours), _pairs(len(texts))
    result: dict[str, Any] = {"n": len(texts), "overlap@10": {}, "spearman": {}}
    for size in sizes:
        vectors = to_embeddings(states[size.num_layers], size.dim, model.config.similarity)
        similarities = vectors @ vectors.T
        shared = (_nearest(similarities, neighbours)[:, :, None] == nearest[:, None, :]).any(dim=2)
        result["overlap@10"][str(size)] = shared.float().mean().item()
        left, right = similarities[rows].double().numpy(), reference[rows].double().numpy()
        varied = np.ptp(left) > 0 and np.ptp(right) > 0
        result["spearman"][str(size)] = float(spearmanr(left, right).statistic) if varied else 0.0
    return result


def _nearest(similarities: torch.Tensor, count: int) -> torch.Tensor:
    """(n, count), the numbers of the nearest other texts."""
    return similarities.clone().fill_diagonal_(-torch.inf).topk(count, dim=1).indices


def _pairs(texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns of pairs of different texts, all of them or a draw that is always the same."""
    rows, columns = torch.triu_indices(texts, texts, offset=1)
    if len(rows) > _PAIRS:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_PAIRS]
        rows, columns = rows[chosen], columns[chosen]
    return rows, columns
