"""Weights that are saved have the mode of the other files of their folder, whoever saves them."""

from pathlib import Path

import pytest
import tiny_vision
from conftest import LADDER
from test_trainer import TRIPLETS, train

from modeling_2dmse import StarbucksForMaskedAutoencoding
from modeling_mrl import MatryoshkaForSequenceClassification


def save(kind: str, folder: Path, tiny_model, tiny_m3, backbone_path) -> None:
    """Save a tiny model of a kind."""
    if kind == "cut":
        tiny_model().truncate(2, 8).save_pretrained(folder)
    elif kind == "sharded":
        tiny_model().save_pretrained(folder, max_shard_size="20KB")
    elif kind == "smae":
        StarbucksForMaskedAutoencoding.from_backbone(backbone_path("bert"), sizes=LADDER).save_pretrained(folder)
    elif kind == "m3":
        tiny_m3().save_pretrained(folder)
    elif kind == "mrl":
        MatryoshkaForSequenceClassification.from_backbone(backbone_path("bert"), sizes=[4, 8]).save_pretrained(folder)
    elif kind == "franca":
        tiny_vision.tiny_model().save_pretrained(folder / "whole")
        tiny_vision.tiny_model().teacher.save_pretrained(folder / "teacher")
        tiny_vision.tiny_model().teacher.save_backbone(folder / "backbone")
    else:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
        train(adapted, folder, TRIPLETS, max_steps=1, save_strategy="steps", save_steps=1)


@pytest.mark.parametrize("kind", ["cut", "sharded", "smae", "m3", "mrl", "franca", "adapter"])
def test_saved_weights_have_the_mode_of_the_other_files(kind, tiny_model, tiny_m3, backbone_path, tmp_path):
    (tmp_path / "like").touch()
    save(kind, tmp_path / "saved", tiny_model, tiny_m3, backbone_path)
    modes = {path: path.stat().st_mode for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in modes)
    assert set(modes.values()) == {(tmp_path / "like").stat().st_mode}


def test_the_folders_of_the_hub_share_one_file():
    root = Path(__file__).parents[2]
    assert len({path.read_text() for path in root.glob("modeling_*/file_modes.py")}) == 1
    assert len(list(root.glob("modeling_*/file_modes.py"))) == 4
