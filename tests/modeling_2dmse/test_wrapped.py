"""Backbones that are placed, offloaded, wrapped or compiled: the right vectors, or one line that says what to do."""

import functools
import sys
import types

import numpy as np
import pytest
import torch
from conftest import LADDER, SENTENCES
from torch.nn.utils import parametrizations

from modeling_2dmse import TwoDMSEModel, truncation

LAYER = "backbone.encoder.layer"
MAPS = {
    "whole": {"": "cpu"},
    "encoder as one": {"backbone.embeddings": "cpu", "backbone.encoder": "cpu"},
    "encoder on disk": {"backbone.embeddings": "cpu", "backbone.encoder": "disk"},
    "all on disk": {"backbone": "disk"},
    "layers apart": {"backbone.embeddings": "disk", **{f"{LAYER}.{n}": ("cpu", "disk")[n % 2] for n in range(4)}},
}


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_equal(model: TwoDMSEModel, folder) -> None:
    plain = TwoDMSEModel.from_pretrained(folder)
    for n in (1, 2, 4):
        np.testing.assert_allclose(model.encode(SENTENCES, n), plain.encode(SENTENCES, n), atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_device_maps(name, folder, tmp_path):
    model = TwoDMSEModel.from_pretrained(folder, device_map=MAPS[name], offload_folder=str(tmp_path / "off"))
    assert_equal(model, folder)
    if "disk" in MAPS[name].values():
        with pytest.raises(ValueError, match=r"device_map: the weights of this model are on .*meta"):
            model.truncate(2)
    else:
        assert_equal(model.truncate(4), folder)


def test_offload_of_the_whole_model(folder):
    import accelerate

    model = TwoDMSEModel.from_pretrained(folder)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert_equal(model, folder)
    with pytest.raises(ValueError, match="weights of this model are offloaded by accelerate; save it before"):
        model.save_pretrained(folder.parent / "saved")
    model.add_exit_projections()
    model.add_exit_gates()
    for modules in (model.exit_projections, model.exit_gates):
        assert {weight.device.type for weight in modules.parameters()} == {"cpu"}
    assert_equal(model, folder)


@pytest.mark.parametrize("other", [None, "before", "after"])
def test_a_hook_that_offloads_the_layers_as_one_is_refused(other, folder):
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    model = TwoDMSEModel.from_pretrained(folder)
    encoder, expected = model.backbone.encoder, model.encode(SENTENCES)
    weights = dict(encoder.state_dict())
    if other == "before":
        add_hook_to_module(encoder, ModelHook())
    hook = AlignDevicesHook("cpu", offload=True, place_submodules=True, weights_map=weights)
    add_hook_to_module(encoder, hook, append=True)
    if other == "after":
        add_hook_to_module(encoder, ModelHook(), append=True)
    for mode in (True, False):
        with pytest.raises(ValueError, match="a hook of accelerate offloads BertEncoder as a whole"):
            model.train(mode).encode(SENTENCES, 1)
        np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-6)


@pytest.mark.parametrize(
    "device_map", [{"": "disk"}, {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}, {"": "meta"}]
)
def test_importing_an_offloaded_backbone(device_map, backbone_path, tmp_path):
    path, options = backbone_path("bert"), {"device_map": device_map, "offload_folder": str(tmp_path / "off")}
    if device_map == {"": "meta"}:
        with pytest.raises(ValueError, match=r"device_map: .* is on the meta device, which keeps no values"):
            TwoDMSEModel.from_backbone(path, **options)
        model = TwoDMSEModel(TwoDMSEModel.from_backbone(path).config).to("meta")
        model.tokenizer = TwoDMSEModel.from_backbone(path).tokenizer
        with pytest.raises(ValueError, match="model: its weights are on the meta device, which keeps no values"):
            model.encode(SENTENCES)
        return
    TwoDMSEModel.from_backbone(path, sizes=LADDER).save_pretrained(tmp_path / "plain")
    model = TwoDMSEModel.from_backbone(path, sizes=LADDER, **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_equal(model, tmp_path / "plain")


def closure(module: torch.nn.Module):
    forward = module.forward
    return lambda *args, **kwargs: forward(*args, **kwargs)


def method_around(module: torch.nn.Module):
    forward = module.forward
    return types.MethodType(lambda _, *args, **kwargs: forward(*args, **kwargs), module)


@pytest.mark.parametrize("path", ["", "backbone", "backbone.encoder.layer.1", "backbone.encoder.layer.1.attention"])
def test_forwards_that_were_set_on_modules_never_run_in_training_mode(path, folder):
    for wrap in (closure, method_around):
        model = TwoDMSEModel.from_pretrained(folder).train()
        module = model.get_submodule(path)
        module.forward = wrap(module)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"the forward of {type(module).__name__} was replaced by a function"):
                model.encode(SENTENCES)
        assert model.training
        if path != "backbone":
            assert_equal(model.eval(), folder)
    model = TwoDMSEModel.from_pretrained(folder).train()
    module = model.get_submodule(path)
    module.forward = functools.partial(functools.partial(module.forward), return_dict=True)
    if path.endswith(("1", "attention")):
        module.forward = functools.partial(type(module).forward, module)
    assert_equal(model, folder)
    assert model.training


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights(name, folder):
    model = TwoDMSEModel.from_pretrained(folder)
    getattr(parametrizations, name)(model.backbone.encoder.layer[1].attention.self.query)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inputs = model.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**inputs, layers=[4]).layer_embeddings[0])
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-6)
    np.testing.assert_allclose(model.train().encode(SENTENCES), expected, atol=1e-6)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("path", ["backbone", "backbone.encoder"])
def test_a_wrapped_forward_is_refused_where_it_would_run_all_layers(path, folder):
    model = TwoDMSEModel.from_pretrained(folder)
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    for n in (1, 3):
        with pytest.raises(ValueError, match="is wrapped, and runs all 4 layers"):
            model.encode(SENTENCES, n)
    plain = TwoDMSEModel.from_pretrained(folder)
    np.testing.assert_allclose(model.encode(SENTENCES), plain.encode(SENTENCES), atol=1e-6)


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile needs an older Python")
def test_compiled_parts(folder):
    model = TwoDMSEModel.from_pretrained(folder)
    model.backbone.compile(backend="eager")
    model.backbone.encoder.layer[1] = torch.compile(model.backbone.encoder.layer[1], backend="eager")
    assert_equal(model, folder)
    assert_equal(model.train(), folder)
    assert_equal(model.eval().truncate(4), folder)
    model.save_pretrained(folder.parent / "saved")
    assert_equal(TwoDMSEModel.from_pretrained(folder.parent / "saved"), folder)
    model = TwoDMSEModel.from_pretrained(folder)
    model.backbone = torch.compile(model.backbone, backend="eager")
    with pytest.raises(ValueError, match="OptimizedModule is not a model of transformers; wrap the whole model"):
        model.encode(SENTENCES)


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile needs an older Python")
@pytest.mark.parametrize("part", ["model", "layers", "forward"])
def test_a_compiled_model_encodes_texts_of_several_lengths(part, folder):
    model = TwoDMSEModel.from_pretrained(folder)
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    else:
        for module in [model] if part == "model" else model.backbone.encoder.layer:
            module.compile(backend="eager", dynamic=True)
        assert_equal(model.train(), folder)
    assert_equal(model.eval(), folder)
    assert model.packs, "it would run packed rows if it were not compiled"


class Around(torch.nn.Module):
    """A module of one's own around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_modules_around_parts(folder, monkeypatch):
    model = TwoDMSEModel.from_pretrained(folder)
    model.backbone.encoder.layer[1] = Around(model.backbone.encoder.layer[1])
    assert_equal(model, folder)
    with pytest.raises(ValueError, match=r"this model has no backbone.encoder.layer.1.*; a part of it is wrapped"):
        model.truncate(2)
    warnings: list[str] = []
    monkeypatch.setattr(truncation.logger, "warning", warnings.append)
    TwoDMSEModel.from_pretrained(folder).save_pretrained(folder.parent / "plain")
    assert not warnings
    model.save_pretrained(folder.parent / "saved")
    assert "a part of it is wrapped, and from_pretrained will refuse what is saved now" in warnings[0]
    with pytest.raises(ValueError, match=r"backbone\.encoder\.layer\.1"):
        TwoDMSEModel.from_pretrained(folder.parent / "saved")
    for around in (Around, torch.nn.Sequential):
        model = TwoDMSEModel.from_pretrained(folder)
        model.backbone.encoder.layer = around(model.backbone.encoder.layer)
        with pytest.raises(ValueError, match=f"encoder.layer is {around.__name__}, not a list of 4 layers; wrap the"):
            model.encode(SENTENCES, 2)
    model.backbone.encoder = torch.nn.Sequential(model.backbone.encoder)
    with pytest.raises(ValueError, match=r"BertModel has no encoder.layer; wrap the layers or the whole model"):
        model.encode(SENTENCES)
    model.backbone = torch.nn.DataParallel(model.backbone)
    with pytest.raises(ValueError, match="DataParallel is not a model of transformers; wrap the whole model"):
        model.encode(SENTENCES)
