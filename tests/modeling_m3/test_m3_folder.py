"""The saved folder on its own, loaded with remote code and by the registered classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_elsewhere
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor

QUESTION = "user : <image> which digit is this ? assistant :"
LOAD_ELSEWHERE = """
import sys
assert not any("modeling_m3" in name for name in sys.modules)
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without trust_remote_code")
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
stock, info = type(model).from_pretrained(sys.argv[2], output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
out = {}
for size in (9, 36):
    batch = processor(images=[Image.open(sys.argv[3])], text=[sys.argv[4]], num_visual_tokens=size, return_tensors="pt")
    out[f"logits{size}"] = model(**batch, num_visual_tokens=size).logits.detach().numpy()
    out[f"stock{size}"] = stock(**batch, num_visual_tokens=size).logits.detach().numpy()
    out[f"words{size}"] = model.generate(**batch, num_visual_tokens=size, max_new_tokens=4, num_beams=2).numpy()
np.savez(sys.argv[5], **out)
try:
    import modeling_m3
except ImportError:
    pass
else:
    raise AssertionError("the project is on the path; this proves nothing")
"""


def test_remote_code_in_a_fresh_process(tiny_m3, llava_path, llava_processor, tmp_path):
    model = tiny_m3(visual_token_sizes=[9, 36])
    model.save_pretrained(tmp_path / "here")
    llava_processor.save_pretrained(tmp_path / "here")
    elsewhere = shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    picture = Image.fromarray(torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy())
    picture.save(tmp_path / "picture.png")
    arguments = [elsewhere, llava_path, tmp_path / "picture.png", QUESTION, tmp_path / "out.npz"]
    run_elsewhere(LOAD_ELSEWHERE, tmp_path, *map(str, arguments))
    got = np.load(tmp_path / "out.npz")
    for size in (9, 36):
        batch = llava_processor(images=[picture], text=[QUESTION], num_visual_tokens=size, return_tensors="pt")
        expected = model(**batch, num_visual_tokens=size).logits.detach().numpy()
        assert np.allclose(got[f"logits{size}"], expected, atol=1e-6)
        assert np.allclose(got[f"stock{size}"], expected, atol=1e-6)
        words = model.generate(**batch, num_visual_tokens=size, max_new_tokens=4, num_beams=2)
        assert np.array_equal(got[f"words{size}"], words.numpy())


def test_auto_classes_give_the_registered_classes(tiny_m3, llava_processor, tmp_path):
    tiny_m3().save_pretrained(tmp_path)
    llava_processor.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is MatryoshkaLlavaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MatryoshkaLlavaProcessor


def test_the_folder_has_the_files_that_it_needs(tiny_m3, tmp_path):
    tiny_m3().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "matryoshka_llava"
    assert config["visual_token_sizes"] == [1, 9, 36]
    names = {path.name for path in tmp_path.glob("*.py")}
    assert names == {"configuration_m3.py", "modeling_m3.py", "costs.py", "file_modes.py", "visual_tokens.py"}
    assert "torchvision" not in "".join(path.read_text() for path in tmp_path.glob("*.py"))


def test_changes_are_checked_when_a_model_is_loaded(tiny_m3):
    assert tiny_m3(visual_token_sizes=[36, 4]).config.visual_token_sizes == [4, 36]
    with pytest.raises(ValueError, match="pool_position: 'inside' is unknown"):
        tiny_m3(pool_position="inside")
    with pytest.raises(ValueError, match="default_visual_tokens: 5 is not allowed"):
        tiny_m3(default_visual_tokens=5)


def test_a_broken_configuration_is_refused_on_loading(tiny_m3, tmp_path):
    tiny_m3().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["visual_token_sizes"] = [4, 9]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="4 and 9 do not nest"):
        MatryoshkaLlavaForConditionalGeneration.from_pretrained(tmp_path)
