"""Packed rows equal padded batches, for every family that packs, exit, pooling and way of attending."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SENTENCES

from modeling_2dmse import packing
from modeling_2dmse.packing import Packing, pool_packed
from modeling_2dmse.pooling import pool
from modeling_2dmse.tokens import tokenize

PADDED_ONLY = ("mpnet",)
PACKING = [family for family in FAMILIES if family not in PADDED_ONLY]
TEXTS = [*SENTENCES[:7], "a", " ".join(SENTENCES[:4]), "she is", "a"]


def both(model, texts=TEXTS, layers=(1, 2, 4)):
    tokens = tokenize(model.tokenizer, texts, 40)
    padded = model(**tokens.padded(), layers=layers).layer_embeddings
    return padded, model(**tokens.packed(), layers=layers).layer_embeddings


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("family", PACKING)
def test_a_packed_row_equals_a_padded_batch(family, pooling, tiny_model):
    model = tiny_model(family, pooling=pooling, projected=True)
    assert model.packs
    with torch.no_grad():
        padded, packed = both(model)
    assert padded.std() > 0.1
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", PACKING)
def test_the_padded_attention_of_a_gpu_is_the_same(family, tiny_model, monkeypatch):
    """Where a GPU has no kernel for rows of many texts, the attention alone is padded."""
    model = tiny_model(family)
    assert model.packs
    monkeypatch.setattr(packing, "_attend_by_length", packing._attend_padded)
    with torch.no_grad():
        padded, packed = both(model)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_gradients_are_the_same(family, tiny_model):
    model = tiny_model(family)
    gradients = []
    for index in range(2):
        model.zero_grad()
        (both(model)[index] ** 3).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    padded, packed = gradients
    assert set(padded) == set(packed)
    assert max(gradient.abs().max() for gradient in padded.values()) > 1
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", PADDED_ONLY)
def test_a_family_with_relative_biases_keeps_padded_batches(family, tiny_model):
    model = tiny_model(family)
    assert not model.packs
    with pytest.raises(ValueError, match="packing: MPNetModel runs padded batches only"):
        both(model)


def test_another_attention_keeps_padded_batches(backbone_path, tiny_model):
    model = tiny_model(attn_implementation="eager")
    assert not model.packs
    assert model.backbone.config._attn_implementation == "eager"


def test_finding_out_leaves_padded_batches_as_they_were(tiny_model):
    model = tiny_model()
    batch = tokenize(model.tokenizer, TEXTS, 40).padded()
    with torch.no_grad():
        before = model(**batch, layers=(2, 4)).layer_embeddings
        assert model.packs
        assert torch.equal(model(**batch, layers=(2, 4)).layer_embeddings, before)


def test_finding_out_calls_no_hooks(tiny_model):
    model, calls = tiny_model(), []
    for layer in model.backbone.encoder.layer:
        layer.register_forward_hook(lambda *_: calls.append(1))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert model.packs
    assert not calls


@pytest.mark.parametrize("family", ["bert", *PADDED_ONLY])
def test_encode_packs_texts_of_different_lengths(family, tiny_model):
    model, packings = tiny_model(family), []
    watch = lambda m, args, kwargs: packings.append(kwargs.get("packing"))
    model.register_forward_pre_hook(watch, with_kwargs=True)
    model.encode(["a man plays"])
    same = model.encode(["a man plays", "two dogs run"])
    assert packings == [None, None]
    mixed = model.encode(["a man plays", "two dogs run", "a woman reads a book in the park"])
    lengths = None if packings[-1] is None else sorted(packings[-1].lengths - 2)
    assert lengths == (None if family in PADDED_ONLY else [3, 3, 8])
    assert np.abs(mixed[:2] - same).max() < 1e-6


def test_a_cut_of_a_model_that_packs_packs_too(tiny_model):
    model = tiny_model()
    assert model.packs
    small = model.truncate(2)
    assert small.packs
    with torch.no_grad():
        padded, packed = both(small, layers=(1, 2))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "weightedmean"])
def test_pooling_of_segments(mode):
    lengths = [3, 1, 4, 4, 2]
    state = torch.randn(sum(lengths), 5)
    batch, mask = torch.zeros(5, 4, 5), torch.zeros(5, 4, dtype=torch.long)
    for row, part in enumerate(state.split(lengths)):
        batch[row, : len(part)], mask[row, : len(part)] = part, 1
    assert torch.allclose(pool_packed(state, Packing(lengths), mode), pool(batch, mask, mode), atol=1e-6)


def test_a_packing_says_where_texts_are():
    one = Packing([2, 2, 3, 1])
    assert one.cu_seq_lens.tolist() == [0, 2, 4, 7, 8]
    assert one.position_ids.tolist() == [[0, 1, 0, 1, 0, 1, 2, 0]]
    assert one.equal_lengths == [(0, 2, 2), (4, 1, 3), (7, 1, 1)]
    tokens, places, mask = one.padded
    row = torch.arange(8)
    assert torch.equal(row[tokens].flatten()[places], row)
    assert mask.sum(dim=(1, 2, 3)).tolist() == [2, 2, 3, 1]
    assert np.all(one.lengths == [2, 2, 3, 1])
