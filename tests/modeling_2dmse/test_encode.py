"""encode: order, shapes, prompts, precisions, and errors for wrong arguments; grouping and batching by length."""

import itertools

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from modeling_2dmse import batching
from modeling_2dmse.batching import back_in_order, even_groups, tight_groups, token_batches
from modeling_2dmse.formats import quantize
from modeling_2dmse.pooling import cut_and_normalize, pool


def test_embeddings_follow_the_definition(tiny_model):
    model = tiny_model()
    expected = []
    for text in SENTENCES[:5]:  # one by one, without padding
        inputs = model.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            state = model.backbone(**inputs, output_hidden_states=True).hidden_states[2][0].double()
        vector = state.mean(0)[:12]
        expected.append((vector / vector.norm()).numpy())
    got = model.encode(SENTENCES[:5], num_layers=2, dim=12, batch_size=2)
    assert got.dtype == np.float32
    assert np.allclose(got, expected, atol=1e-6)


def test_order_batch_size_and_single_string(tiny_model):
    model = tiny_model()
    one = model.encode(SENTENCES, batch_size=1)
    assert np.allclose(one, model.encode(SENTENCES, batch_size=7), atol=1e-5)
    assert np.allclose(one[::-1], model.encode(SENTENCES[::-1]), atol=1e-5)
    assert model.encode(SENTENCES[0]).shape == (32,)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert model.encode([], num_layers=1, dim=5).shape == (0, 5)
    assert model.training is False


def test_long_input_in_pieces(tiny_model, monkeypatch):
    model = tiny_model()
    expected = model.encode(SENTENCES)
    monkeypatch.setattr(batching, "max", lambda *_: 6, raising=False)
    assert np.allclose(model.encode(SENTENCES, batch_size=4), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_longer_texts_are_truncated_at_the_last_position(family, tiny_model):
    model = tiny_model(family)
    model.tokenizer.model_max_length = 10**9
    long = model.encode(["a man " * 200])
    assert np.allclose(long, model.encode(["a man " * 200], max_length=model.max_length), atol=1e-6)
    assert np.isfinite(long).all()
    offset = {"roberta": 1, "mpnet": 2}.get(family, 0)
    expected = {"distilbert": 64}.get(family, 64)
    assert model.max_length == expected - offset


def test_a_tokenizer_without_a_padding_token(tiny_model, tokenizer):
    import copy

    model = tiny_model("llama")
    expected = model.encode(SENTENCES[:4])
    bare = copy.deepcopy(tokenizer)
    bare.pad_token, bare.eos_token = None, "[SEP]"
    model.tokenizer = bare
    assert np.allclose(model.encode(SENTENCES[:4]), expected, atol=1e-6)


def test_tensors_and_training_mode(tiny_model):
    model = tiny_model().train()
    tensor = model.encode(SENTENCES[:2], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, model.encode(SENTENCES[:2], convert_to_tensor=True))  # no dropout inside
    assert model.training


def test_prompts(tiny_model):
    model = tiny_model(prompts={"query": "the girl "})
    plain = model.encode(["the girl is reading"])
    assert np.allclose(model.encode(["is reading"], prompt_name="query"), plain, atol=1e-6)
    assert np.allclose(model.encode(["is reading"], prompt="the girl "), plain, atol=1e-6)
    model.config.default_prompt_name = "query"
    assert np.allclose(model.encode(["is reading"]), plain, atol=1e-6)
    with pytest.raises(ValueError, match="prompt_name: 'passage' is unknown; this model's prompts: query"):
        model.encode(["x"], prompt_name="passage")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"texts": ["a", 3]}, "texts: item 1 is a int"),
        ({"texts": None}, "texts: a NoneType is not allowed; give a string or a list of strings"),
        ({"texts": 2.5}, "texts: a float is not allowed"),
        ({"texts": {"a": 1}}, "texts: a dict is not allowed"),
        ({"texts": np.array("a")}, "texts: a ndarray is not allowed"),
        ({"texts": ["a"], "num_layers": 5}, "num_layers: 5 is not allowed; this model has 1 to 4"),
        ({"texts": ["a"], "num_layers": 0}, "num_layers: 0 is not allowed"),
        ({"texts": ["a"], "dim": 33}, "dim: 33 is not allowed; this model has 1 to 32"),
        ({"texts": ["a"], "dim": True}, "dim: True is not allowed"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size: 0 is not allowed"),
        ({"texts": ["a"], "precision": "int3"}, "precision: 'int3' is unknown; choose one of float32"),
        ({"texts": [], "num_layers": 9}, "num_layers: 9 is not allowed"),
    ],
)
def test_wrong_arguments_name_the_argument_and_the_range(kwargs, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        tiny_model().encode(**kwargs)


def test_layers_must_ascend(tiny_model):
    model = tiny_model()
    inputs = model.tokenizer("a man", return_tensors="pt")
    for layers in ((2, 1), (1, 1), ()):
        with pytest.raises(ValueError, match="layers"):
            model(**inputs, layers=layers)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="not both"):
        model(**inputs, layers=(1,), num_layers=1)


def test_precisions():
    vectors = cut_and_normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), 64)
    exact = vectors @ vectors.T
    small = quantize(vectors, "int8")
    assert small.dtype == torch.int8
    scale = 127 * 64**0.5 / 4
    assert (small.float() / scale - vectors).abs().max() <= 0.51 / scale + 1e-6
    assert (small.float() @ small.float().T / scale**2 - exact).abs().max() < 0.02
    assert quantize(vectors, "float16").dtype == torch.float16
    bits = quantize(vectors, "binary")
    assert bits.shape == (50, 8)
    assert (np.unpackbits(bits.numpy(), axis=1) == (vectors > 0).numpy()).all()


def test_pooling_against_loops():
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(3, 5, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    for row in range(3):
        real = [state[row, t].double() for t in range(5) if mask[row, t]]
        expected = {
            "mean": sum(real) / len(real),
            "cls": real[0],
            "lasttoken": real[-1],
            "weightedmean": sum(w * x for w, x in enumerate(real, start=1)) / sum(range(1, len(real) + 1)),
        }
        for mode, value in expected.items():
            assert torch.allclose(pool(state, mask, mode)[row].double(), value, atol=1e-6), mode
    with pytest.raises(ValueError, match="pooling: 'max'"):
        pool(state, mask, "max")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool(state, mask, "mean"), pool(state.float(), mask, "mean"))
        assert pool(state, mask, "mean").dtype == torch.float32


def padded(groups) -> int:
    return sum(len(rows) * longest for rows, longest in groups)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_tight_groups_leave_the_least_padding(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        lengths = rng.integers(1, 12, size=8).tolist()
        groups = tight_groups(lengths, count)
        assert sorted(np.concatenate([rows for rows, _ in groups])) == list(range(8))
        assert all(max(lengths[i] for i in rows) == longest for rows, longest in groups)
        ordered, best = sorted(lengths), np.inf
        for cuts in itertools.combinations_with_replacement(range(9), count - 1):
            parts = [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, 8])]
            best = min(best, sum(len(part) * max(part, default=0) for part in parts))
        assert len(groups) <= count
        assert padded(groups) == best


def test_even_groups_have_at_most_the_given_number_of_rows():
    lengths = [5, 1, 4, 9, 2, 2, 7]
    groups = even_groups(lengths, 3)
    assert [len(rows) for rows, _ in groups] == [3, 2, 2]
    assert [longest for _, longest in groups] == [2, 5, 9]
    values = torch.tensor([lengths[i] for rows, _ in groups for i in rows])
    assert values[back_in_order(groups)].tolist() == lengths


def test_batches_have_as_many_tokens_as_the_batch_of_the_longest_texts():
    lengths = np.random.default_rng(0).integers(1, 40, size=300).tolist()
    batches = list(token_batches(lengths, 4))
    assert sorted(np.concatenate(batches)) == list(range(300))
    tokens = [len(rows) * lengths[rows[0]] for rows in batches]
    assert max(tokens) <= 4 * max(lengths)
    assert min(tokens[:-1]) > 3 * max(lengths) - 40
    assert [len(rows) for rows in token_batches([9, 9, 9], 3, most=10)] == [1, 1, 1]


def test_a_corpus_of_several_pieces_keeps_its_order(tiny_model, monkeypatch):
    model = tiny_model()
    texts = [f"{text} {i}" for i, text in enumerate(SENTENCES * 4)]
    whole = model.encode(texts)
    monkeypatch.setattr(batching, "_PIECE", 5)
    assert np.allclose(model.encode(texts, batch_size=2), whole, atol=1e-6)
