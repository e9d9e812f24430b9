"""Backbones that are placed, offloaded, wrapped or compiled: the right vectors, or one line that says what to do."""

import sys

import numpy as np
import pytest
import torch
from conftest import SENTENCES

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


def test_a_hook_that_offloads_the_layers_as_one_is_refused(folder):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = TwoDMSEModel.from_pretrained(folder)
    encoder = model.backbone.encoder
    weights = dict(encoder.state_dict())
    add_hook_to_module(encoder, AlignDevicesHook("cpu", offload=True, place_submodules=True, weights_map=weights))
    with pytest.raises(ValueError, match="a hook of accelerate offloads BertEncoder as a whole"):
        model.encode(SENTENCES, 1)


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
    model.backbone.encoder = torch.nn.Sequential(model.backbone.encoder)
    with pytest.raises(ValueError, match=r"BertModel has no encoder.layer; wrap the layers or the whole model"):
        model.encode(SENTENCES)
    model.backbone = torch.nn.DataParallel(model.backbone)
    with pytest.raises(ValueError, match="DataParallel is not a model of transformers; wrap the whole model"):
        model.encode(SENTENCES)
