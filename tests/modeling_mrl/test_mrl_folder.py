"""The saved folder on its own: remote code in a fresh process, and stock pipelines."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import SENTENCES, run_elsewhere
from PIL import Image
from tiny_classifiers import EXITS, image_classifier, one_leaves_at_each, text_classifier, token_batch
from transformers import ViTImageProcessorPil, pipeline

from modeling_mrl import MatryoshkaForImageClassification, confidences

LOAD_ELSEWHERE = """
import sys
assert not any("modeling_mrl" in name for name in sys.modules)
import numpy as np
import torch
import transformers
auto, folder = getattr(transformers, sys.argv[1]), sys.argv[2]
try:
    auto.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without trust_remote_code")
model = auto.from_pretrained(folder, trust_remote_code=True)
plain = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(plain).__name__ == type(model).__name__
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.sizes == model.config.sizes
batch = {name: torch.from_numpy(value) for name, value in np.load(sys.argv[3]).items()}
with torch.no_grad():
    output, cascade = model(**batch), model.predict_cascade(batch)
small = model.truncate(config.sizes[0])
np.savez(
    sys.argv[4], all=output.size_logits.numpy(), one=output.logits.numpy(), sizes=cascade.sizes.numpy(),
    small=small(**batch).logits.detach().numpy(),
)
try:
    import modeling_mrl
except ImportError:
    pass
else:
    raise AssertionError("the project is on the path; this proves nothing")
"""


@pytest.mark.parametrize("kind", ["text", "image"])
def test_remote_code_in_a_fresh_process(kind, backbone_path, tmp_path):
    if kind == "text":
        model = text_classifier(backbone_path("bert"), sizes=EXITS, size="2x4", head_type="tied")
        auto, batch = "AutoModelForSequenceClassification", token_batch()
    else:
        model = image_classifier("vit", tmp_path / "backbone", size=8)
        auto, batch = "AutoModelForImageClassification", {"pixel_values": torch.randn(4, 3, 16, 16)}
    output = model(**batch)
    model.save_pretrained(tmp_path / "here")
    for name in (auto, "AutoModel"):
        assert type(getattr(transformers, name).from_pretrained(tmp_path / "here")) is type(model)
    model.config.thresholds = one_leaves_at_each(confidences(output.size_logits)[0])
    expected = model.predict_cascade(batch)
    model.save_pretrained(tmp_path / "here")
    elsewhere = shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    np.savez(tmp_path / "batch.npz", **{name: value.numpy() for name, value in batch.items()})
    run_elsewhere(
        LOAD_ELSEWHERE, tmp_path, auto, str(elsewhere), str(tmp_path / "batch.npz"), str(tmp_path / "out.npz")
    )
    got = np.load(tmp_path / "out.npz")
    assert np.allclose(got["all"], output.size_logits.detach(), atol=1e-6)
    assert np.allclose(got["one"], output.logits.detach(), atol=1e-6)
    assert np.allclose(got["small"], output.size_logits[0].detach(), atol=1e-6)
    assert got["sizes"].tolist() == expected.sizes.tolist()
    assert len(set(got["sizes"].tolist())) > 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_stock_text_pipeline(batch_size, backbone_path, tokenizer, tmp_path):
    names = {0: "no", 1: "yes", 2: "maybe"}
    model = text_classifier(backbone_path("bert"), sizes=["1x8", "4x32"], size="1x8", id2label=names)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-classification", str(tmp_path), device="cpu")
    found = pipe(SENTENCES[:12], batch_size=batch_size)
    inputs = tokenizer(SENTENCES[:12], padding=True, return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    confidence, labels = confidences(logits)
    assert [row["label"] for row in found] == [names[label] for label in labels.tolist()]
    assert confidence.std() > 1e-3
    assert [row["score"] for row in found] == pytest.approx(confidence.tolist(), abs=1e-5)
    config = pipe.model.config
    whole = type(model).from_pretrained(tmp_path, config=config, size="4x32")  # a pipeline passes both, too
    assert (whole.config.size, config.size) == ("4x32", "1x8")
    assert torch.equal(whole(**inputs).logits, model(**inputs, size="4x32").logits)
    with pytest.raises(ValueError, match="size: "):
        type(model).from_pretrained(tmp_path, config=config, size="4x8")


def test_stock_image_pipeline(tmp_path):
    model = image_classifier("vit", tmp_path / "backbone", id2label={0: "cat", 1: "dog", 2: "cow"})
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    model = MatryoshkaForImageClassification.from_pretrained(tmp_path / "model")
    pipe = pipeline("image-classification", str(tmp_path / "model"), device="cpu")
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(5)]
    found = pipe(images, top_k=1, batch_size=4)
    pixels = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    confidence, labels = confidences(model(pixels).logits)
    assert [row[0]["label"] for row in found] == [model.config.id2label[label] for label in labels.tolist()]
    assert [row[0]["score"] for row in found] == pytest.approx(confidence.tolist(), abs=1e-5)


@pytest.mark.parametrize("through", ["model", "backbone"])
def test_new_words_are_saved(through, backbone_path, tmp_path):
    text_classifier(backbone_path("bert"), sizes=EXITS).save_pretrained(tmp_path)
    model = type(text_classifier(backbone_path("bert"), sizes=EXITS)).from_pretrained(tmp_path)
    (model if through == "model" else model.backbone).resize_token_embeddings(200)
    for saved in (model, model.truncate("2x4")):
        saved.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
