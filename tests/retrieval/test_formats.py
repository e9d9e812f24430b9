"""The compact formats of `retrieval` and of `encode` are the same, though neither imports the other."""

import numpy as np
import pytest
import torch

from modeling_2dmse import formats
from modeling_2dmse.pooling import cut_and_normalize
from retrieval import FunnelIndex
from retrieval.planning import BYTES
from retrieval.stages import PRECISIONS
from retrieval.vectors import prefix as _prefix

WIDTH = 48


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors; the first is one of the axes, whose entry is clipped in int8."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    rows[0] = torch.eye(WIDTH)[0]
    return cut_and_normalize(rows, WIDTH)


def same_codes(ours: np.ndarray, theirs: np.ndarray, scaled: np.ndarray) -> bool:
    """Whether codes are equal, except where the value lies on the border between two codes up to rounding errors."""
    border = np.abs(np.abs(scaled % 1) - 0.5) < 1e-4
    assert border.mean() < 0.01
    return np.array_equal(ours[~border], theirs[~border]) and np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("dim", [7, 32, WIDTH])
def test_int8_codes_are_equal(dim):
    rows = vectors(2000)
    cut = cut_and_normalize(rows, dim)
    encoded = formats.quantize(cut, "int8").numpy()
    stored = _prefix(rows.numpy(), dim, "int8")
    assert stored.dtype == encoded.dtype == np.int8
    assert same_codes(stored, encoded, cut.numpy().astype(np.float64) * 127 * dim**0.5 / 4)
    assert stored[0, 0] == min(127, round(127 * dim**0.5 / 4))
    assert len(np.unique(stored)) > 100, "codes that are nearly all equal would agree at any scale"


@pytest.mark.parametrize("dim", [7, 32, WIDTH])
def test_bits_are_equal(dim):
    rows = vectors(200)
    encoded = formats.quantize(cut_and_normalize(rows, dim), "binary").numpy()
    stored = _prefix(rows.numpy(), dim, "binary").view(np.uint8)
    assert np.array_equal(stored[:, : encoded.shape[1]], encoded)
    assert not stored[:, encoded.shape[1] :].any(), "bits beyond the last dimension are 0"


def test_an_index_stores_the_codes_and_scores_with_their_scale(tmp_path):
    rows, query = vectors(300), vectors(2, seed=1)[1:]
    index = FunnelIndex.build(rows.numpy(), tmp_path / "index", prefixes=[(32, "int8")])
    stored = np.fromfile(tmp_path / "index" / "prefix-32.int8", dtype=np.int8).reshape(300, 32)
    encoded = formats.quantize(cut_and_normalize(rows, 32), "int8").numpy()
    assert same_codes(stored, encoded, cut_and_normalize(rows, 32).numpy().astype(np.float64) * 127 * 32**0.5 / 4)
    scores, ids = index.search(query.numpy(), k=300, stages=[(32, 300, "int8")])
    expected = stored.astype(np.float64) @ cut_and_normalize(query, 32)[0].numpy() * 4 / (127 * 32**0.5)
    assert np.allclose(scores[0], expected[ids[0]], atol=1e-5)
    exact = (cut_and_normalize(rows, 32) @ cut_and_normalize(query, 32)[0]).numpy()
    assert np.abs(expected - exact)[1:].max() < 0.02


def test_planning_counts_the_bytes_of_every_format():
    assert set(formats.PRECISIONS) == set(BYTES)
    assert set(PRECISIONS) < set(formats.PRECISIONS)
    rows = vectors(3)
    for precision in formats.PRECISIONS:
        assert formats.quantize(rows, precision)[0].numpy().nbytes == WIDTH * BYTES[precision]
