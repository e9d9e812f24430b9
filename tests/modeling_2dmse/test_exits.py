"""state(n) is the same during a deeper pass, in a truncated model, in that model saved and reloaded, and in the whole
folder loaded at depth n."""

import pytest
import torch
from conftest import DECODERS, FAMILIES, NUM_LAYERS
from torch import nn
from transformers import AutoModel

from modeling_2dmse import TwoDMSEConfig, TwoDMSEModel
from modeling_2dmse.backbone import check_exits, find_final_norms, find_layer_stack, layers_of
from modeling_2dmse.batching import row_lengths


def batch(padding: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, 7:], mask[2, 4:] = 0, 0
    if padding == "left":
        mask = mask.flip(1)
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def pooled(model, inputs, n) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, layers=(n,)).layer_embeddings[0]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exit_equals_truncated_reloaded_and_loaded_at_depth(family, projected, tiny_model, tmp_path):
    model = tiny_model(family, projected)
    model.save_pretrained(tmp_path / "whole")
    others = {}
    for n in range(1, NUM_LAYERS + 1):
        small = model.truncate(num_layers=n)
        small.save_pretrained(tmp_path / f"small{n}")
        others[n] = {
            "truncated": small,
            "reloaded": AutoModel.from_pretrained(tmp_path / f"small{n}"),
            "loaded at depth": AutoModel.from_pretrained(tmp_path / "whole", num_layers=n),
        }
    for padding in ("none", "right", "left"):
        inputs = batch(padding)
        with torch.no_grad():
            deep = model(**inputs, layers=range(1, NUM_LAYERS + 1)).layer_embeddings
        assert deep.isfinite().all()
        for n in range(1, NUM_LAYERS + 1):
            for how, other in others[n].items():
                assert torch.allclose(pooled(other, inputs, n), deep[n - 1], atol=1e-6), (padding, n, how)
            if n > 1:  # the comparison is only meaningful if depths differ
                assert not torch.allclose(deep[n - 1], deep[n - 2], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_is_the_plain_encoder(family, tiny_model, backbone_path):
    model, plain = tiny_model(family), AutoModel.from_pretrained(backbone_path(family))
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = model(**inputs).last_hidden_state, plain(**inputs).last_hidden_state
    assert torch.allclose(ours[real], theirs[real], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_runs_exactly_its_layers(family, tiny_model):
    model = tiny_model(family)
    calls = []
    for number, layer in enumerate(layers_of(model.backbone, model.config.layer_stack), start=1):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    for kwargs, expected in (
        ({"num_layers": 2}, [1, 2]),
        ({"layers": (1, 3)}, [1, 2, 3]),
        ({}, list(range(1, NUM_LAYERS + 1))),
    ):
        calls.clear()
        model(**batch("right"), **kwargs)
        assert calls == expected
    calls.clear()
    model.encode(["a man plays"], num_layers=3, dim=8)
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_at_depth_builds_and_reads_no_deeper_weight(family, tiny_model, tmp_path, monkeypatch):
    import transformers.modeling_utils as modeling_utils

    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    read = []

    class Recorder:
        """A slice that records when its tensor is actually read."""

        def __init__(self, piece, key):
            self._piece, self._key = piece, key

        def __getattr__(self, name):
            return getattr(self._piece, name)

        def __getitem__(self, item):
            read.append(self._key)
            return self._piece[item]

    original = modeling_utils.safe_open

    class Opened:
        def __init__(self, *args, **kwargs):
            self._file = original(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def get_slice(self, key):
            return Recorder(self._file.get_slice(key), key)

        def __exit__(self, *args):
            return self._file.__exit__(*args)

        def __enter__(self):
            self._file.__enter__()
            return self

    monkeypatch.setattr(modeling_utils, "safe_open", Opened)
    small, info = TwoDMSEModel.from_pretrained(tmp_path, num_layers=2, output_loading_info=True)
    names = set(small.state_dict())
    deeper = {name for name in model.state_dict() if name not in names}
    third_and_fourth = layers_of(model.backbone, model.config.layer_stack)[2:]
    assert len(deeper) == sum(len(layer.state_dict()) for layer in third_and_fourth) > 0
    assert set(read) == names - {n for n, _ in small.named_buffers() if n not in read}
    assert not deeper.intersection(read)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert small.config.sizes == ["1x8", "2x16"]


@pytest.mark.parametrize("family", DECODERS)
def test_last_token_pooling_is_the_same_for_left_and_right_padding(family, tiny_model):
    model = tiny_model(family)
    assert model.config.pooling == "lasttoken"
    right, left = batch("right"), batch("right")
    for row, length in enumerate(right["attention_mask"].sum(1).tolist()):
        for name in left:
            left[name][row] = right[name][row].roll(10 - length)
    assert left["attention_mask"][2, 0] == 0
    assert torch.allclose(pooled(model, left, 3), pooled(model, right, 3), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_buckets_change_nothing(family, tiny_model):
    model = tiny_model(family)
    for padding in ("none", "right", "left"):
        inputs = batch(padding)
        with torch.no_grad():
            whole = model(**inputs, layers=(1, 4)).layer_embeddings
            split = model(**inputs, layers=(1, 4), num_buckets=3).layer_embeddings
            known = model(**inputs, layers=(1, 4), num_buckets=3, lengths=row_lengths(inputs["attention_mask"]))
        assert torch.allclose(whole, split, atol=2e-6)
        assert torch.equal(split, known.layer_embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_buckets_change_nothing_if_a_text_contains_the_padding_token(family, tiny_model):
    """RoBERTa-style models give a padding token no position."""
    model, inputs = tiny_model(family), batch("right")
    inputs["input_ids"][:, 2] = model.config.backbone_config.pad_token_id or 0
    with torch.no_grad():
        whole = model(**inputs, layers=(1, 4)).layer_embeddings
        split = model(**inputs, layers=(1, 4), num_buckets=3).layer_embeddings
    assert torch.allclose(whole, split, atol=2e-6)


def test_the_word_embeddings_of_all_buckets_are_looked_up_at_once(tiny_model):
    model, calls = tiny_model("bert"), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    model(**batch("right"), layers=(4,), num_buckets=3)
    assert calls == [10 + 7 + 4]


def test_gradients_through_exits_and_buckets_equal_those_of_separate_passes(tiny_model):
    model = tiny_model("modernbert").eval()
    inputs = batch("right")
    weight = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    together = gradients((model(**inputs, layers=(2, 4), num_buckets=2).layer_embeddings * weight).sum())
    passes = [model(**inputs, layers=(n,)).layer_embeddings[0] for n in (2, 4)]
    apart = gradients(sum((state * w).sum() for state, w in zip(passes, weight, strict=True)))
    assert all(gradient.abs().max() > 0 for name, gradient in apart.items() if "tok_embeddings" not in name)
    for name in apart:
        assert torch.allclose(together[name], apart[name], atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_pool_in_float32(dtype, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = TwoDMSEModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert pooled(model, batch("right"), 2).dtype == torch.float32


def test_a_backbone_whose_layers_cannot_be_found_is_refused(tmp_path):
    from transformers import AlbertConfig, MarianConfig, MarianMTModel, T5Config, T5EncoderModel, XLNetConfig

    shape = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    shared = AlbertConfig(**shape, embedding_size=8, num_hidden_layers=3)
    both = T5Config(vocab_size=50, d_model=16, num_layers=2, d_kv=8, num_heads=2, d_ff=16)
    odd = XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=16)
    for config, message in (
        (shared, "exactly one list"),
        (both, "encoder and a decoder"),
        (odd, "cannot be made elastic"),
    ):
        folder = tmp_path / config.model_type
        AutoModel.from_config(config).save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            TwoDMSEModel.from_backbone(folder)
    sides = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "vocab_size": 50}
    # Folders whose weights are not those of the model that AutoModel makes of them.
    for model in (T5EncoderModel(both), MarianMTModel(MarianConfig(**sides, **heads))):
        model.save_pretrained(tmp_path / "part")
        with pytest.raises(ValueError, match="has an encoder and a decoder, which is not supported; use a model with"):
            TwoDMSEModel.from_backbone(tmp_path / "part")


def test_the_final_norm_is_found_among_equal_ones(tmp_path):
    from transformers import BloomConfig, GPT2Config, OPTConfig, RobertaPreLayerNormConfig

    tiny = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes = {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    for config, norm in (
        (BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2), "ln_f"),
        (BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2), "ln_f"),
        (GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2), "ln_f"),
        (OPTConfig(**tiny, **sizes), "decoder.final_layer_norm"),
        (RobertaPreLayerNormConfig(**tiny, intermediate_size=16), "LayerNorm"),
    ):
        backbone = AutoModel.from_config(config)
        backbone.save_pretrained(tmp_path / "random")
        assert TwoDMSEModel.from_backbone(tmp_path / "random").config.final_norm == norm
        model = TwoDMSEModel(TwoDMSEConfig(backbone.config))
        assert model.config.final_norm == norm
        with torch.device("meta"):
            assert TwoDMSEModel(TwoDMSEConfig(backbone.config)).config.final_norm == norm
    # The order in which modules are made is not that in which they run.
    model = TwoDMSEModel(TwoDMSEConfig(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)))
    model.backbone.word_embeddings_layernorm = model.backbone._modules.pop("word_embeddings_layernorm")
    model.backbone.ln_f = model.backbone._modules.pop("ln_f")
    assert find_final_norms(model.backbone, "h")[0] == "word_embeddings_layernorm"
    assert check_exits(model.backbone, "h") == "ln_f"


def test_a_backbone_that_changes_its_states_outside_of_its_layers_is_refused(tiny_model):
    model = tiny_model()

    class Rescaled(type(model.backbone)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * 2 + 1
            return output

    model.backbone.__class__ = Rescaled
    with pytest.raises(ValueError, match="outside of its layers"):
        check_exits(model.backbone, find_layer_stack(model.backbone))


def test_truncate_shares_memory_until_converted(tiny_model):
    model = tiny_model()
    small = model.truncate(2, 16)
    assert small.backbone.embeddings.word_embeddings.weight.data_ptr() == (
        model.backbone.embeddings.word_embeddings.weight.data_ptr()
    )
    before = model.encode(["a man"], 2, 16)
    small.half()
    assert model.dtype == torch.float32
    assert (model.encode(["a man"], 2, 16) == before).all()
    assert small.num_layers == 2
    assert small.config.dim == 16
    assert small.config.sizes == ["1x8", "2x16"]


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    inputs, results = batch("right"), []
    for checkpointing in (False, True):
        model = tiny_model().eval()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        model(**inputs, layers=(1, 4)).layer_embeddings.square().sum().backward()
        results.append(model.backbone.encoder.layer[0].output.dense.weight.grad)
    assert results[0].abs().max() > 0
    assert torch.allclose(*results, atol=1e-5)
