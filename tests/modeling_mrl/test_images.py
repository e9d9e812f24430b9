"""MatryoshkaForImageClassification on transformers and convolutional backbones."""

import pytest
import torch
from tiny_classifiers import IMAGE_CONFIGS, image_classifier

from modeling_mrl import MatryoshkaForImageClassification


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pool_by_hand(output, mode: str) -> torch.Tensor:
    state = output.last_hidden_state
    if mode == "pooler":
        return output.pooler_output.reshape(len(state), -1)
    if mode == "cls":
        return state[:, 0]
    return state.mean(dim=(2, 3)) if state.ndim == 4 else state.mean(dim=1)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("vit", "cls"),
        ("vit", "mean"),
        ("vit", "pooler"),
        ("dinov2", "cls"),
        ("resnet", "pooler"),
        ("resnet", "mean"),
        ("convnext", "pooler"),
    ],
)
def test_logits_and_one_size(family, mode, pixels, tmp_path):
    model = image_classifier(family, tmp_path / "backbone", pooling=mode)
    output = model(pixels, labels=torch.tensor([0, 1, 2]))
    with torch.no_grad():
        pooled = pool_by_hand(model.backbone(pixel_values=pixels), mode)
    for index, dim in enumerate([4, 8, 32]):
        linear = model.heads[0].linears[index]
        expected = pooled[:, :dim] @ linear.weight.T + linear.bias
        assert torch.allclose(output.size_logits[index], expected, atol=1e-6)
    assert output.loss.item() == pytest.approx(output.losses.sum().item())
    small = model.truncate(8)
    small.save_pretrained(tmp_path / "small")
    again = MatryoshkaForImageClassification.from_pretrained(tmp_path / "small")
    assert torch.allclose(again(pixels).logits, output.size_logits[1], atol=1e-6)


@pytest.mark.parametrize("family", IMAGE_CONFIGS)
def test_every_weight_learns(family, pixels, tmp_path):
    """A parameter without a gradient would stop DistributedDataParallel."""
    model = image_classifier(family, tmp_path)
    assert model.config.pooling == ("pooler" if family in ("resnet", "convnext") else "cls")
    model(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in without if not name.endswith("mask_token")] == []


def test_poolings_that_do_not_work(pixels, tmp_path):
    with pytest.raises(ValueError, match="pooling: ResNetModel has no first token; use mean or pooler"):
        image_classifier("resnet", tmp_path, pooling="cls")(pixels)
    with pytest.raises(ValueError, match="pooling: 'lasttoken' does not work with MatryoshkaForImageClassification"):
        image_classifier("vit", tmp_path, pooling="lasttoken")
    with pytest.raises(ValueError, match="sizes: 1x8 names layers; only classifiers of texts have several exits"):
        image_classifier("vit", tmp_path, sizes=["1x8", "2x32"])
