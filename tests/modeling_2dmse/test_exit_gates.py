"""Exits that weigh the tokens of a text: every way to the vectors of a gated model gives those of plain loops."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS
from safetensors.torch import load_file, save_file
from test_exits import batch, pooled
from test_packing import TEXTS, both
from transformers import AutoModel

from modeling_2dmse import TwoDMSEConfig, TwoDMSEModel
from modeling_2dmse.configuration_2dmse import POOLING_MODES, WEIGHED_POOLING_MODES
from modeling_2dmse.packing import Packing, packed_weights, pool_packed
from modeling_2dmse.pooling import pool, token_weights
from modeling_2dmse.projection import ExitGate

FAMILIES = ("bert", "mpnet", "modernbert", "qwen3")  # mpnet runs padded batches only


@pytest.fixture
def gated(tiny_model):
    """A function to a model with random projections and gates."""
    return lambda family="bert", pooling="mean": tiny_model(family, projected=True, gated=True, pooling=pooling)


def reference(model: TwoDMSEModel, inputs: dict, n: int) -> torch.Tensor:
    """(texts, hidden) in float64: softmax over the real tokens of each text, one by one. The last exit of a model that
    takes one token takes it; its others weigh all."""
    gate, matrix = model.exit_gates[n - 1].weight[0].double(), model.exit_projections[n - 1].weight.double()
    vectors = []
    with torch.no_grad():
        for state, mask in zip(model.token_states([n], inputs)[0], inputs["attention_mask"], strict=True):
            tokens = [token for token, real in zip(state.double(), mask.tolist(), strict=True) if real]
            places = list(range(1, len(tokens) + 1)) if model.config.pooling == "weightedmean" else [1] * len(tokens)
            if n == NUM_LAYERS and model.config.pooling in ("cls", "lasttoken"):
                one = 0 if model.config.pooling == "cls" else len(tokens) - 1
                places = [int(place == one) for place in range(len(tokens))]
            shares = [place * math.exp(token @ gate) for place, token in zip(places, tokens, strict=True)]
            mean = sum(share / sum(shares) * token for share, token in zip(shares, tokens, strict=True))
            vectors.append(matrix @ mean)
    return torch.stack(vectors)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("pooling", POOLING_MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_the_softmax_over_real_tokens(family, pooling, padding, gated, tiny_model):
    model, inputs = gated(family, pooling), batch(padding)
    plain = tiny_model(family, projected=True, pooling=pooling)
    for n in range(1, NUM_LAYERS + 1):
        found = pooled(model, inputs, n)
        torch.testing.assert_close(found.double(), reference(model, inputs, n), atol=1e-5, rtol=1e-5)
        weighed = n < NUM_LAYERS or pooling in WEIGHED_POOLING_MODES
        assert ((found - pooled(plain, inputs, n)).abs().max() > 0.1) == weighed
        with torch.no_grad():
            states = model(**inputs, num_layers=n).last_hidden_state
        torch.testing.assert_close(pool(states, inputs["attention_mask"], pooling), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", WEIGHED_POOLING_MODES)
def test_neutral_gates_change_nothing(pooling, tiny_model):
    plain, model = (tiny_model(projected=True, pooling=pooling) for _ in range(2))
    model.add_exit_gates()
    inputs = batch("left")
    assert all(gate.is_neutral for gate in model.exit_gates)
    for n in (1, NUM_LAYERS):
        np.testing.assert_allclose(model.encode(TEXTS, n), plain.encode(TEXTS, n), atol=1e-6)
        states, real = (
            [each(**inputs, num_layers=n).last_hidden_state for each in (model, plain)],
            inputs["attention_mask"],
        )
        torch.testing.assert_close(*(state[real.bool()] for state in states))


def test_gates_are_added_once(gated):
    model = gated()
    gates = model.exit_gates
    model.add_exit_gates()
    assert model.exit_gates is gates
    assert not any(gate.is_neutral for gate in gates)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exit_equals_truncated_reloaded_and_loaded_at_depth(family, pooling, gated, tmp_path):
    model = gated(family, pooling)
    model.save_pretrained(tmp_path / "whole")
    for n in range(1, NUM_LAYERS + 1):
        small = model.truncate(num_layers=n)
        small.save_pretrained(tmp_path / f"small{n}")
        assert len(small.exit_gates) == n
        others = [small, AutoModel.from_pretrained(tmp_path / f"small{n}")]
        others.append(AutoModel.from_pretrained(tmp_path / "whole", num_layers=n))
        for padding in ("none", "right", "left"):
            expected = pooled(model, batch(padding), n)
            for other in others:
                torch.testing.assert_close(pooled(other, batch(padding), n), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLING_MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_bucketed_equal_padded(family, pooling, gated):
    model = gated(family, pooling)
    tokens = model.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt", padding_side="right")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        padded = model(**tokens, layers=(2, 4)).layer_embeddings
        split = model(**tokens, layers=(2, 4), num_buckets=3).layer_embeddings
    torch.testing.assert_close(split, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_states(TEXTS, (2, 4)), padded, atol=1e-5, rtol=1e-5)
    assert model.packs == (family != "mpnet")
    if model.packs:
        with torch.no_grad():
            torch.testing.assert_close(*both(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("mode", WEIGHED_POOLING_MODES)
def test_weights_of_packed_rows(mode, scale):
    lengths = [3, 1, 4, 4, 2]
    logits = scale * torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)).sign()
    logits[:3] = torch.tensor([1.0, 0.5, -1.0]) * scale
    padded, mask = torch.full((5, 4), 1e4), torch.zeros(5, 4, dtype=torch.long)
    for row, part in enumerate(logits.split(lengths)):
        padded[row, 4 - len(part) :], mask[row, 4 - len(part) :] = part, 1
    weights, packing = token_weights(padded, mask, mode), Packing(lengths)
    packed = packed_weights(logits, packing, mode)
    torch.testing.assert_close(packed, weights[mask.bool()])
    assert weights.isfinite().all()
    assert not weights[mask == 0].any()
    assert weights.max() > 1.5
    ones = torch.ones(5, 4, 1)
    torch.testing.assert_close(pool(ones, mask, mode, weights), torch.ones(5, 1))
    torch.testing.assert_close(pool_packed(ones.flatten(0, 1)[: sum(lengths)], packing, mode, packed), torch.ones(5, 1))


@pytest.mark.parametrize("mode", WEIGHED_POOLING_MODES)
def test_a_row_of_padding_weighs_nothing(mode):
    logits, mask = torch.randn(2, 4, requires_grad=True), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    weights = token_weights(logits, mask, mode)
    assert weights[0].tolist() == [0, 0, 0, 0]
    assert pool(torch.randn(2, 4, 3), mask, mode, weights)[0].tolist() == [0, 0, 0]
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].any()


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_gradients_reach_the_gates_of_padded_and_packed_rows(pooling, gated):
    gradients, model = [], gated(pooling=pooling)
    for index in range(2):
        model.zero_grad()
        (both(model)[index] ** 3).sum().backward()
        gradients.append([gate.weight.grad for gate in model.exit_gates])
    for n, (padded, packed) in enumerate(zip(*gradients, strict=True), start=1):
        # `both` asks for the exits 1, 2 and 4.
        unused = n == 3 or (n == 4 and pooling not in WEIGHED_POOLING_MODES)
        assert (padded is None) == (packed is None) == unused
        if not unused:
            assert padded.abs().max() > 0.1
            torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


def test_half_precision_weighs_in_float32(gated, tmp_path):
    gate = ExitGate(8)
    torch.nn.init.normal_(gate.weight)
    state, mask = torch.randn(2, 5, 8).bfloat16(), torch.ones(2, 5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate(state)
        weights, packed = token_weights(logits, mask, "mean"), packed_weights(logits.flatten(), Packing([5, 5]), "mean")
    assert {tensor.dtype for tensor in (logits, weights, packed)} == {torch.float32}
    torch.testing.assert_close(packed, weights.flatten())
    model = gated()
    model.save_pretrained(tmp_path)
    half = TwoDMSEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {gate.weight.dtype for gate in half.exit_gates} == {torch.bfloat16}
    assert pooled(half, batch("right"), 2).dtype == torch.float32
    assert half(**batch("right")).last_hidden_state.dtype == torch.bfloat16
    assert (half.encode(TEXTS, 2) * model.encode(TEXTS, 2)).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_stock_sentence_transformers(pooling, similarity, gated, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = gated(pooling=pooling)
    model.config.similarity = similarity
    model.save_pretrained(tmp_path / "whole")
    model.truncate(2, 8).save_pretrained(tmp_path / "cut")
    stock = SentenceTransformer(str(tmp_path / "whole"), trust_remote_code=True, device="cpu")
    for n in (1, NUM_LAYERS):
        np.testing.assert_allclose(stock.encode(TEXTS, num_layers=n), model.encode(TEXTS, n), atol=1e-5)
    for n in (1, NUM_LAYERS):
        depth = {"num_layers": n}
        stock = SentenceTransformer(str(tmp_path / "whole"), trust_remote_code=True, device="cpu", model_kwargs=depth)
        np.testing.assert_allclose(stock.encode(TEXTS), model.encode(TEXTS, n), atol=1e-5)
    expected = model.encode(TEXTS, 2, 8)
    cut = SentenceTransformer(str(tmp_path / "cut"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(cut.encode(TEXTS), expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1) == (similarity == "cosine")


def test_a_folder_from_before_there_were_gates(tiny_model, tmp_path):
    model = tiny_model(projected=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("exit_gates") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = TwoDMSEModel.from_pretrained(tmp_path)
    assert again.exit_gates is None
    np.testing.assert_allclose(again.encode(TEXTS, 2), model.encode(TEXTS, 2), atol=1e-6)


def test_weights_that_do_not_fit_the_configuration_are_refused(gated, tmp_path):
    gated().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no place for 4 of the tensors in the weights, for example exit_gates\.0"):
        TwoDMSEModel.from_pretrained(tmp_path, exit_gates=False)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["exit_gates.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack 1 of the tensors .* exit_gates\.1\.weight"):
        TwoDMSEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("pooling", sorted(set(POOLING_MODES) - set(WEIGHED_POOLING_MODES)))
def test_exits_below_the_last_one_take_the_mean_in_place_of_one_token(pooling, tiny_model):
    plain, model, mean = (tiny_model(projected=True, pooling=name) for name in (pooling, pooling, "mean"))
    model.add_exit_gates()
    assert (model.config.pooling, model.config.exit_poolings) == (pooling, ["mean"] * (NUM_LAYERS - 1) + [pooling])
    for n in range(1, NUM_LAYERS + 1):
        expected = (mean if n < NUM_LAYERS else plain).encode(TEXTS, n)
        np.testing.assert_allclose(model.encode(TEXTS, n), expected, atol=1e-6)
    model.remove_exit_gates()
    assert (model.exit_gates, model.config.exit_gates) == (None, False)
    np.testing.assert_allclose(model.encode(TEXTS, 1), mean.encode(TEXTS, 1), atol=1e-6)


def test_wrong_poolings_of_exits_are_refused(tiny_model):
    config = tiny_model().config.to_dict()
    for wrong, message in ((["mean", "max", "cls", "cls"], "pooling: 'max' is unknown"), (["cls"], "1 for 4 exits")):
        with pytest.raises(ValueError, match=message):
            TwoDMSEConfig(**config | {"exit_poolings": wrong})


def test_adapters_of_all_linear_layers_leave_gates_alone(gated):
    peft = pytest.importorskip("peft")
    model = gated()
    expected = pooled(model, batch("right"), 2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    names = [name for name, _ in adapted.named_parameters()]
    assert any("lora" in name for name in names)
    assert not any("lora" in name for name in names if "exit_gates" in name)
    torch.testing.assert_close(pooled(adapted, batch("right"), 2), expected, atol=1e-5, rtol=1e-5)
    merged = adapted.merge_and_unload()
    assert isinstance(merged.truncate(2).exit_gates[1], ExitGate)
