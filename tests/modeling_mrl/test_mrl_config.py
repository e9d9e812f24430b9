"""Every wrong value is refused with the name of its field, and every right one survives a round trip."""

import json
import math

import pytest
from conftest import tiny_config
from transformers import AutoConfig, ResNetConfig

from modeling_mrl import MatryoshkaConfig, Size


def config(**kwargs) -> MatryoshkaConfig:
    return MatryoshkaConfig(backbone_config=tiny_config("bert"), **kwargs)


def test_sizes_are_sorted_and_weights_follow_them():
    assert config().sizes == ["8", "16", "32"]
    assert config(sizes=[32, 4]).ladder == [Size(None, 4), Size(None, 32)]
    two = config(sizes=["4x32", "2x8", "2x16", 8], loss_weights=[1, 2, 3, 4])
    assert two.sizes == ["2x8", "2x16", "4x8", "4x32"]
    assert two.loss_weights == [2, 3, 4, 1]
    assert two.exits == [2, 4]
    assert two.dims_of(2) == [8, 16]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": []}, "sizes: the list is empty"),
        ({"sizes": [8, 16, 8]}, "sizes: 8 appears more than once"),
        ({"sizes": ["4x8", 8]}, "sizes: 4x8 appears more than once"),
        ({"sizes": [0, 8]}, "sizes: '0' is not a size"),
        ({"sizes": [-8]}, "sizes: '-8' is not a size"),
        ({"sizes": [2.5]}, "sizes: '2.5' is not a size"),
        ({"sizes": "64"}, "sizes: '64' is not a list"),
        ({"sizes": [8, 33]}, "sizes: 33 asks for 33 dimensions; the backbone has 1 to 32"),
        ({"sizes": ["5x8"]}, "sizes: 5x8 asks for 5 layers; the backbone has 1 to 4"),
        ({"head_type": "shared"}, "head_type: 'shared' is unknown; choose one of separate, tied"),
        ({"pooling": "max"}, "pooling: 'max' is unknown"),
        ({"loss_reduction": "none"}, "loss_reduction: 'none' is unknown; choose one of sum, mean"),
        ({"loss_weights": [1, 1]}, "loss_weights: .* must be a list of 3 numbers, one per size"),
        ({"loss_weights": [1, -1, 1]}, "loss_weights: .* must have no negative numbers"),
        ({"loss_weights": [0, 0, 0]}, "loss_weights: .* and not only zeros"),
        ({"loss_weights": [1, math.nan, 1]}, "loss_weights: .* must have only finite numbers"),
        ({"loss_weights": [1, "1", 1]}, "loss_weights: .* must have only finite numbers"),
        ({"thresholds": [0.5]}, "thresholds: .* must be a list of 2 numbers, one for each size but the largest"),
        ({"thresholds": [0.5, math.nan]}, "thresholds: .* must have only finite numbers"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0 is not allowed"),
        ({"label_smoothing": math.nan}, "label_smoothing: nan is not allowed"),
        ({"num_labels": 1}, "num_labels: 1 is not allowed"),
        ({"size": 5}, "size: 5 has no head, and with head_type separate it cannot use another size's head"),
        ({"size": "2x8"}, "size: 2x8 is not at an exit with a head"),
        ({"size": 33, "head_type": "tied"}, "size: 33 asks for 33 dimensions; the head has 1 to 32"),
        ({"size": "big"}, "size: 'big' is not a size"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_a_tied_head_has_every_prefix():
    assert config(size=5, head_type="tied").find_size() == Size(None, 5)
    assert config(sizes=["2x8", "4x32"], head_type="tied").find_size("2x5") == Size(2, 5)
    assert config(sizes=["2x8", "4x32"]).find_size(32) == Size(4, 32)


def test_widths_of_backbones():
    assert MatryoshkaConfig(backbone_config=ResNetConfig(hidden_sizes=[8, 16])).hidden_size == 16
    with pytest.raises(
        ValueError, match="sizes: the configuration of resnet has no number of layers; name only dimensions"
    ):
        MatryoshkaConfig(backbone_config=ResNetConfig(hidden_sizes=[8, 16]), sizes=["2x8"])
    with pytest.raises(ValueError, match=r"backbone_config: .* names neither hidden_size nor hidden_sizes"):
        MatryoshkaConfig(backbone_config=AutoConfig.for_model("t5gemma"))


def test_round_trip(tmp_path):
    written = config(
        sizes=["2x8", "4x32"],
        thresholds=[0.75],
        head_type="tied",
        loss_weights=[0.5, 1],
        size="2x8",
        id2label={0: "no", 1: "yes", 2: "maybe"},
    )
    written.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["thresholds"] == [0.75]
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, MatryoshkaConfig)
    names = ("sizes", "thresholds", "head_type", "loss_weights", "size", "id2label", "pooling", "hidden_size")
    assert {name: getattr(read, name) for name in names} == {name: getattr(written, name) for name in names}
    assert read.num_labels == 3
