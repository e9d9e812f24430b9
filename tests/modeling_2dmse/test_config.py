"""Sizes, ladders and the configuration."""

import json

import pytest
from transformers import AutoConfig

from modeling_2dmse import Size, TwoDMSEConfig, TwoDMSEModel, parse_ladder, parse_size


@pytest.mark.parametrize("text", ["6", "x128", "6x", "6x0", "0x8", "-1x8", "6 x 128", "axb", ""])
def test_malformed_sizes(text):
    with pytest.raises(ValueError, match="is not a size; write LAYERSxDIM"):
        parse_size(text)


def test_ladders():
    assert parse_ladder(["4x32", "1x8"]) == [Size(1, 8), Size(4, 32)]
    assert parse_ladder("4x32") == [Size(4, 32)]
    with pytest.raises(ValueError, match="the ladder is empty"):
        parse_ladder([])
    with pytest.raises(ValueError, match="1x8 appears more than once"):
        parse_ladder(["1x8", "1x8"])
    with pytest.raises(ValueError, match="7x8 asks for 7 layers, but the backbone has 1 to 6"):
        parse_ladder(["7x8"], 6, 384)
    with pytest.raises(ValueError, match="6x385 asks for 385 dimensions, but the backbone has 1 to 384"):
        parse_ladder(["6x385"], 6, 384)


def test_config_round_trip(tiny_model, tmp_path):
    model = tiny_model(prompts={"query": "find: "})
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["is_matryoshka"] is True
    assert stored["matryoshka_dimensions"] == [8, 16, 32]
    assert (stored["hidden_size"], stored["num_hidden_layers"]) == (32, 4)
    assert str(tmp_path.parent) not in json.dumps(stored)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, TwoDMSEConfig)
    assert config.ladder == [Size(1, 8), Size(2, 16), Size(4, 32)]
    assert config.prompts == {"query": "find: "}
    changing = {"transformers_version", "_name_or_path"}
    read, written = config.to_dict(), model.config.to_dict()
    assert {key: read[key] for key in read if key not in changing} == {
        key: written[key] for key in written if key not in changing
    }


def test_wrong_values(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="pooling: 'max' is unknown"):
        TwoDMSEConfig(pooling="max")
    with pytest.raises(ValueError, match="5x8 asks for 5 layers"):
        tiny_model(sizes=["5x8"])
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_layers: 5 is not allowed; this model has 1 to 4"):
        TwoDMSEModel.from_pretrained(tmp_path, num_layers=5)


def test_each_way_of_loading_names_the_other(tiny_model, backbone_path, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an elastic model already; load it with from_pretrained"):
        TwoDMSEModel.from_backbone(tmp_path)
    with pytest.raises(ValueError, match="from_backbone imports a plain encoder"):
        TwoDMSEModel.from_pretrained(backbone_path("bert"))


def test_pooling_is_read_from_a_sentence_transformers_folder(backbone_path, tmp_path):
    import shutil

    folder = shutil.copytree(backbone_path("bert"), tmp_path / "st")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert TwoDMSEModel.from_backbone(folder).config.pooling == "cls"
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "weightedmean"}')
    assert TwoDMSEModel.from_backbone(folder).config.pooling == "weightedmean"
    assert TwoDMSEModel.from_backbone(folder, pooling="mean").config.pooling == "mean"
