"""SMAE against a plain reference: every token's logits, one size after another, with transformers' own classes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, HIDDEN, LADDER, NUM_LAYERS, run_elsewhere, tiny_config
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining

from modeling_2dmse import StarbucksForMaskedAutoencoding, TwoDMSEModel, parse_ladder

MASKED = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra", "modernbert")
SIZES = parse_ladder(LADDER)


@pytest.fixture(scope="module")
def mlm_path(tokenizer, tmp_path_factory):
    """A function from a family's name to a folder with a tiny random masked-language model of this family."""
    folders = {}

    def path(family: str) -> str:
        if family not in folders:
            torch.manual_seed(FAMILIES.index(family))
            model = AutoModelForMaskedLM.from_config(tiny_config(family))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folders[family] = tmp_path_factory.mktemp(f"{family}-mlm")
            model.save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return str(folders[family])

    return path


def make_batch(seed=0, rows=3, length=10) -> dict:
    """Padded on the right; the encoder's masked tokens are a subset of the decoder's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (rows, length), generator=generator)
    attention = (torch.arange(length) < torch.tensor([length, 6, 8])[:rows, None]).long()
    drawn = torch.rand((rows, length), generator=generator)
    drawn[:, 0] = 1.0
    heavy = (drawn < 0.6) & attention.bool()
    light = heavy & (drawn < 0.3)
    ids = ids * attention
    return {
        "input_ids": ids.masked_fill(light, 4),
        "attention_mask": attention,
        "labels": ids.masked_fill(~light, -100),
        "decoder_input_ids": ids.masked_fill(heavy, 4),
        "decoder_labels": ids.masked_fill(~heavy, -100),
    }


def _head(model, states):
    """Logits and transform of a family's own head, which gets zeros beyond the size's dimensions."""
    states = F.pad(states, (0, HIDDEN - states.shape[-1]))
    kind = model.config.model_type
    if kind == "bert":
        transform = model.cls.predictions.transform(states)
        return model.cls.predictions.decoder(transform), transform
    if kind in ("roberta", "xlm-roberta", "mpnet"):
        return model.lm_head(states), model.lm_head.layer_norm(F.gelu(model.lm_head.dense(states)))
    if kind == "distilbert":
        transform = model.vocab_layer_norm(model.activation(model.vocab_transform(states)))
        return model.vocab_projector(transform), transform
    if kind == "electra":
        transform = model.generator_predictions(states)
        return model.generator_lm_head(transform), model.electra.embeddings_project(transform)
    transform = model.head(states)
    return model.decoder(transform), transform


def _decoder(model):
    """A copy of the model's body with its own first layer and everything else shared."""
    body = model.base_model
    twin = copy.deepcopy(body)
    for name in ("embeddings", "embeddings_project", "final_norm"):
        if hasattr(body, name):
            setattr(twin, name, getattr(body, name))
    if model.config.model_type == "mpnet":
        twin.encoder.relative_attention_bias = body.encoder.relative_attention_bias
    owner = next(m for m in twin.modules() for child in m.children() if _is_stack(child))
    name = next(name for name, child in owner.named_children() if _is_stack(child))
    setattr(owner, name, getattr(owner, name)[:1])
    twin.config.num_hidden_layers = 1
    return twin, getattr(owner, name)[0]


def _is_stack(module):
    return isinstance(module, torch.nn.ModuleList) and len(module) == NUM_LAYERS


def _reference(model, batch):
    """The loss, from a loop over sizes with all logits; each size's parts; and the decoder's layer."""
    body = model.base_model
    states = body(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states
    norm = getattr(body, "final_norm", lambda state: state)
    twin, layer = _decoder(model)
    total, parts = 0.0, []
    for n, d in SIZES:
        state = (norm(states[n]) if n < NUM_LAYERS else states[n])[:, :, :d]
        logits, transform = _head(model, state)
        mlm = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

        def replace(module, args, kwargs, first=transform[:, :1]):
            hidden, *rest = args
            return (torch.cat((first, hidden[:, 1:]), dim=1), *rest), kwargs

        handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
        decoded = twin(batch["decoder_input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        handle.remove()
        mae = F.cross_entropy(_head(model, decoded)[0].flatten(0, 1), batch["decoder_labels"].flatten())
        total = total + (mlm + mae) / 2 / len(SIZES)
        hits = (logits.argmax(-1) == batch["labels"])[batch["labels"] != -100].float().mean()
        parts.append((mlm.item(), mae.item(), hits.item()))
    return total, parts, layer


@pytest.mark.parametrize("family", MASKED)
def test_loss_and_gradients_equal_the_plain_reference(mlm_path, family):
    reference = AutoModelForMaskedLM.from_pretrained(mlm_path(family)).eval()
    model = StarbucksForMaskedAutoencoding.from_backbone(mlm_path(family), sizes=LADDER).eval()
    batch = make_batch()
    expected, parts, layer = _reference(reference, batch)
    expected.backward()
    output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    ours = zip(output.loss_mlm.tolist(), output.loss_mae.tolist(), output.accuracy_mlm.tolist(), strict=True)
    for got, wanted in zip(ours, parts, strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)
    theirs = dict(reference.base_model.named_parameters())
    pairs = [(value, theirs[name]) for name, value in model.encoder.backbone.named_parameters()]
    pairs += zip(model.decoder_layer.parameters(), layer.parameters(), strict=True)
    inside = {id(parameter) for parameter in theirs.values()}
    heads = {tuple(p.shape): p for p in reference.parameters() if id(p) not in inside}
    pairs += [(p, heads[tuple(p.shape)]) for p in (model.head.dense.weight, model.head.bias) if p is not None]
    for got, wanted in pairs:
        if wanted.grad is None:
            assert got.grad is None
            continue
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=0)
    trained = [wanted for _, wanted in pairs if wanted.grad is not None and wanted.grad.abs().max() > 1e-4]
    assert len(trained) > 0.8 * len(pairs)


def test_the_head_of_a_checkpoint_is_kept_and_a_missing_one_created(mlm_path, backbone_path):
    kept = StarbucksForMaskedAutoencoding.from_backbone(mlm_path("bert"), sizes=LADDER)
    own = AutoModelForMaskedLM.from_pretrained(mlm_path("bert"))
    assert torch.equal(kept.head.dense.weight, own.cls.predictions.transform.dense.weight)
    assert torch.equal(kept.head.bias, own.cls.predictions.decoder.bias)
    for family in ("bert", "electra"):
        made = StarbucksForMaskedAutoencoding.from_backbone(backbone_path(family), sizes=LADDER)
        assert made.head.bias.abs().max() == 0
        assert made.head.dense.weight.std() > 0.01
        loss = made(**make_batch()).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert made.get_input_embeddings().weight.grad.abs().max() > 0


def test_an_untied_head_keeps_its_own_word_embeddings(tokenizer, tmp_path):
    config = tiny_config("bert")
    config.tie_word_embeddings = False
    own = AutoModelForMaskedLM.from_config(config)
    own.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = StarbucksForMaskedAutoencoding.from_backbone(tmp_path, sizes=LADDER)
    assert torch.equal(model.head.output.weight, own.cls.predictions.decoder.weight)
    assert not torch.equal(model.head.output.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
def test_saves_and_reloads_as_itself_and_as_an_encoder(mlm_path, tmp_path, family):
    model = StarbucksForMaskedAutoencoding.from_backbone(mlm_path(family), sizes=LADDER).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    expected = model(**make_batch()).loss
    model.save_pretrained(tmp_path / "smae")
    again = AutoModelForPreTraining.from_pretrained(tmp_path / "smae").eval()
    assert type(again) is StarbucksForMaskedAutoencoding
    assert torch.equal(again(**make_batch()).loss, expected)
    model.encoder.tokenizer.save_pretrained(tmp_path / "smae")
    text = ["a man plays the guitar"]
    encoder = AutoModel.from_pretrained(tmp_path / "smae")
    assert type(encoder) is TwoDMSEModel
    assert (encoder.encode(text, num_layers=2) == model.encoder.encode(text, num_layers=2)).all()
    small = AutoModel.from_pretrained(tmp_path / "smae", size="2x8")
    assert small.num_layers == 2
    assert (small.encode(text) == model.encoder.encode(text, num_layers=2, dim=8)).all()
    with pytest.raises(ValueError, match=r"it is an SMAE pre-training model; AutoModel\.from_pretr"):
        TwoDMSEModel.from_pretrained(tmp_path / "smae")
    model.save_encoder(tmp_path / "encoder")
    encoder = TwoDMSEModel.from_pretrained(tmp_path / "encoder")
    assert encoder.config.sizes == LADDER
    assert (encoder.encode(text, num_layers=2) == model.encoder.encode(text, num_layers=2)).all()


LOAD_ELSEWHERE = """
import torch
from transformers import AutoModel, AutoModelForPreTraining
model = AutoModelForPreTraining.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
batch, loss = torch.load(sys.argv[2])
assert torch.equal(model(**batch).loss, loss)
# The folder of the encoder, inside of a folder that has the code, and the encoder of the whole.
encoders = [
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **place)
    for place in ({}, {"subfolder": "encoder"}, {"subfolder": "encoder", "num_layers": 2})
]
vectors = [encoder.encode(["a man plays the guitar"], num_layers=2) for encoder in encoders]
assert vectors[0].shape == (1, 32) and all((other == vectors[0]).all() for other in vectors)
"""


def test_loads_with_remote_code_without_this_package(mlm_path, tmp_path):
    model = StarbucksForMaskedAutoencoding.from_backbone(mlm_path("bert"), sizes=LADDER).eval()
    model.save_pretrained(tmp_path / "smae")
    model.encoder.tokenizer.save_pretrained(tmp_path / "smae")
    model.save_encoder(tmp_path / "smae" / "encoder")
    with torch.no_grad():
        torch.save((make_batch(), model(**make_batch()).loss), tmp_path / "case.pt")
    run_elsewhere(LOAD_ELSEWHERE, tmp_path, str(tmp_path / "smae"), str(tmp_path / "case.pt"))


def test_layers_above_the_ladder_are_dropped(mlm_path):
    model = StarbucksForMaskedAutoencoding.from_backbone(mlm_path("bert"), sizes=["1x8", "2x32"])
    assert model.encoder.num_layers == 2
    model(**make_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrong_input_is_refused(backbone_path, mlm_path, tmp_path):
    with pytest.raises(ValueError, match="Qwen3Model reads from left to right"):
        StarbucksForMaskedAutoencoding.from_backbone(backbone_path("qwen3"), sizes=LADDER)
    with pytest.raises(ValueError, match="sizes: 9x8 asks for 9 layers, but the backbone has 1 to 4"):
        StarbucksForMaskedAutoencoding.from_backbone(backbone_path("bert"), sizes=["9x8"])
    with pytest.raises(ValueError, match="sizes: no ladder is set"):
        StarbucksForMaskedAutoencoding.from_backbone(backbone_path("bert"))
    with pytest.raises(ValueError, match="they would be random"):
        StarbucksForMaskedAutoencoding.from_pretrained(mlm_path("bert"))


def test_word_embeddings_are_resized_before(backbone_path):
    model = StarbucksForMaskedAutoencoding.from_backbone(backbone_path("bert"), sizes=LADDER)
    with pytest.raises(ValueError, match="resize_token_embeddings: resize the encoder or the masked-language model"):
        model.resize_token_embeddings(200)


def test_no_masked_words_give_zero(mlm_path):
    model = StarbucksForMaskedAutoencoding.from_backbone(mlm_path("bert"), sizes=LADDER)
    batch = make_batch()
    batch["labels"].fill_(-100)
    output = model(**batch)
    assert output.loss_mlm.tolist() == [0.0] * len(LADDER)
    assert output.loss_mae.min() > 0
    output.loss.backward()


def test_gradient_checkpointing_gives_the_same_gradients(mlm_path):
    model = StarbucksForMaskedAutoencoding.from_backbone(mlm_path("bert"), sizes=LADDER)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(**make_batch()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
