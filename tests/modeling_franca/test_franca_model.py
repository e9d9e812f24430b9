"""The loss against plain loops, the teacher, saved folders on their own, and every wrong input."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import run_elsewhere
from tiny_vision import FAMILIES, SETTINGS, SHAPE, draw_picture, tiny_batch, tiny_config, tiny_model, tiny_processor
from transformers import AutoModel, AutoModelForPreTraining, Dinov2Config, ViTConfig

from modeling_franca import FrancaConfig, FrancaForPretraining, FrancaModel, koleo_loss, sinkhorn

LOAD_ELSEWHERE = """
import sys
assert not any("modeling_franca" in name for name in sys.modules)
import numpy as np
from transformers import AutoModel, AutoModelForPreTraining
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without trust_remote_code")
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
whole = AutoModelForPreTraining.from_pretrained(sys.argv[1], trust_remote_code=True)
plain = AutoModel.from_pretrained(sys.argv[2])
assert type(plain).__module__.startswith("transformers.models."), type(plain)
import torch
from PIL import Image
pictures = [Image.fromarray(array) for array in np.load(sys.argv[3])]
pixels = model.image_processor(pictures, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    states = plain(pixels).last_hidden_state[:, 0]
np.savez(sys.argv[4], model=model.encode(pictures, dim=8), whole=whole.encode(pictures, dim=8), plain=states)
try:
    import modeling_franca
except ImportError:
    pass
else:
    raise AssertionError("the project is on the path; this proves nothing")
"""


def plain_loss(model: FrancaForPretraining, batch: dict, temperature: float) -> tuple[list, list, float]:
    """Cross-entropies of each size, and KoLeo, one image, crop and patch at a time."""
    config, pictures = model.config, len(batch["mask"])
    views, hidden = batch["global_crops"].flatten(0, 1), batch["mask"].flatten(0, 1)
    target, seen = model.teacher(views), model.student(views, hidden)
    local = model.student(batch["local_crops"].flatten(0, 1)).pooler_output.view(pictures, 3, -1)
    student = torch.cat((seen.pooler_output.view(pictures, 2, -1), local), dim=1)
    cls, patch = [], []
    for level in range(len(config.nesting_sizes)):
        assigned = sinkhorn(model.teacher_heads["cls"](target.pooler_output)[level], temperature).view(pictures, 2, -1)
        terms = [
            cross_entropy(assigned[b, t], model.student_heads["cls"](student[b, s][None])[level][0])
            for b in range(pictures)
            for t in range(2)
            for s in range(5)
            if s != t
        ]
        cls.append(sum(terms) / len(terms))
        wanted = [(c, n) for c in range(2 * pictures) for n in range(16) if hidden[c, n]]
        tokens = torch.stack([target.patch_tokens[c, n] for c, n in wanted])
        assigned = sinkhorn(model.teacher_heads["patch"](tokens)[level], temperature)
        total = 0.0
        for row, (c, n) in zip(assigned, wanted, strict=True):
            scores = model.student_heads["patch"](seen.patch_tokens[c, n][None])[level][0]
            total += cross_entropy(row, scores) / (hidden[c].sum() * 2 * pictures)
        patch.append(total)
    koleo = (koleo_loss(student[:, 0]) + koleo_loss(student[:, 1])) / 2
    return cls, patch, koleo


def cross_entropy(assigned: torch.Tensor, scores: torch.Tensor):
    logits = scores / 0.1
    return -sum(q * (logit - logits.exp().sum().log()) for q, logit in zip(assigned, logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_the_plain_loops(family):
    model, batch = tiny_model(family, koleo_weight=0.3, patch_weight=0.7).eval(), tiny_batch()
    assert {*batch["mask"].sum(dim=2).flatten().tolist()} > {0}
    output = model(**batch, teacher_temperature=0.05)
    with torch.no_grad():
        cls, patch, koleo = plain_loss(model, batch, 0.05)
    assert output.loss_cls.tolist() == pytest.approx([value.item() for value in cls], rel=1e-4)
    assert output.loss_patch.tolist() == pytest.approx([value.item() for value in patch], rel=1e-4)
    assert output.koleo.item() == pytest.approx(koleo.item(), rel=1e-4)
    expected = sum(cls) / 3 + 0.7 * sum(patch) / 3 + 0.3 * koleo
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert model(**batch, teacher_temperature=0.5).loss.item() != pytest.approx(output.loss.item(), rel=1e-3)


def test_koleo_is_the_mean_or_as_released_the_sum_over_crops():
    batch = tiny_batch()
    mean, total = (tiny_model(koleo_reduction=name).eval()(**batch) for name in ("mean", "sum"))
    assert total.koleo.item() == pytest.approx(2 * mean.koleo.item(), rel=1e-5)
    assert (total.loss - mean.loss).item() == pytest.approx(0.1 * mean.koleo.item(), rel=1e-3)


def test_masks_hide_patches_and_change_the_loss():
    model, batch = tiny_model().eval(), tiny_batch()
    views, mask = batch["global_crops"][:, 0], batch["mask"][:, 0]
    with torch.no_grad():
        plain, hidden = model.student(views).patch_tokens, model.student(views, mask).patch_tokens
        views[mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(views)] = 7.0
        assert torch.allclose(model.student(views, mask).patch_tokens, hidden, atol=1e-5), (
            "the student sees a hidden patch"
        )
    assert not torch.allclose(plain, hidden, atol=1e-2)
    nothing = model(**batch | {"mask": torch.zeros_like(batch["mask"])})
    assert nothing.loss_patch.tolist() == [0, 0, 0]
    assert torch.isfinite(nothing.loss)
    assert model(batch["global_crops"]).loss_patch.tolist() == [0, 0, 0]


def test_only_the_first_dimensions_are_trained_by_the_smallest_level():
    model, batch = tiny_model(koleo_weight=0.0).eval(), tiny_batch()
    states = torch.randn(4, 5, 16, requires_grad=True)
    with torch.no_grad():
        teacher = model.teacher(batch["global_crops"].flatten(0, 1)).pooler_output
    losses = model._loss_of_crops(states, teacher, (4, 2), 0.07)
    for level, size in enumerate((4, 8, 16)):
        gradient = torch.autograd.grad(losses[level], states, retain_graph=True)[0]
        assert (gradient[..., :size] != 0).all()
        assert (gradient[..., size:] == 0).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_teacher_is_a_moving_average(momentum):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    model.update_teacher(momentum)
    moved = 0
    for name, value in model.state_dict().items():
        if name.startswith("teacher"):
            student = before[name.replace("teacher", "student", 1)].double()
            expected = momentum * before[name].double() + (1 - momentum) * student
            assert torch.allclose(value.double(), expected, atol=1e-6), name
            moved += (value - before[name]).abs().max() > 1e-3
        else:
            assert torch.equal(value, before[name]), name
    assert moved > 20 if momentum < 1 else moved == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_neither_trains_nor_has_gradients(family, tmp_path):
    made = FrancaForPretraining(tiny_config(family))
    pairs = zip(made.student.parameters(), made.teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "a new teacher equals the student"
    assert not made.teacher.training
    tiny_model(family).save_pretrained(tmp_path)
    for model in (tiny_model(family), FrancaForPretraining.from_pretrained(tmp_path).train()):
        assert model.student.training
        assert not any(module.training for module in [*model.teacher.modules(), *model.teacher_heads.modules()])
        model(**tiny_batch()).loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("teacher"):
                assert not parameter.requires_grad
                assert parameter.grad is None
            else:
                assert parameter.grad is not None, f"{name} would stop DistributedDataParallel"
        assert sum(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None) > 20


def test_without_patch_loss_every_trained_parameter_has_a_gradient():
    model = tiny_model(patch_weight=0.0)
    assert "patch" not in model.student_heads
    model(**tiny_batch()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()


def test_schedules():
    config = FrancaConfig(
        momentum=0.9, final_momentum=1.0, teacher_temperature=0.08, initial_teacher_temperature=0.04,
        teacher_temperature_warmup=0.25,
    )  # fmt: skip
    for step in range(11):
        done = step / 10
        assert config.momentum_at(done) == pytest.approx(1.0 - 0.1 * (1 + math.cos(math.pi * done)) / 2)
        assert config.teacher_temperature_at(done) == pytest.approx(0.04 + 0.04 * min(1, done / 0.25))
    assert FrancaConfig(teacher_temperature_warmup=0.0).teacher_temperature_at(0) == 0.07


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_load_as_model_and_as_plain_backbone(family, tmp_path):
    model = tiny_model(family).eval()
    model.save_pretrained(tmp_path / "whole")
    model.teacher.save_backbone(tmp_path / "plain")
    pictures = [draw_picture(i % 2, i) for i in range(5)]
    expected = model.encode(pictures)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    for dim in (3, 8):
        cut = expected[:, :dim] / np.linalg.norm(expected[:, :dim], axis=1, keepdims=True)
        assert np.allclose(model.encode(pictures, dim=dim, batch_size=2), cut, atol=1e-5)
    teacher = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(teacher) is FrancaModel
    assert np.allclose(teacher.encode(pictures), expected, atol=1e-6)
    again = AutoModelForPreTraining.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    backbone, info = AutoModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(backbone).__module__.startswith(f"transformers.models.{family}")
    assert not info["unexpected_keys"]
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"pooler"}, "a ViT's pooler is not trained"
    assert not list((tmp_path / "plain").glob("*.py"))
    pixels = tiny_processor()(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = backbone(pixels).last_hidden_state[:, 0].numpy()
    assert np.allclose(states / np.linalg.norm(states, axis=1, keepdims=True), expected, atol=1e-5)
    imported = FrancaModel.from_backbone(tmp_path / "plain", nesting_sizes=[4, 16])
    assert np.allclose(imported.encode(pictures), expected, atol=1e-6)
    start = FrancaForPretraining.from_backbone(tmp_path / "plain", **SETTINGS)
    assert np.allclose(start.encode(pictures), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(start.student.eval()(pixels).pooler_output, start.teacher(pixels).pooler_output)


def test_an_offloaded_model_in_training_mode():
    import accelerate

    model = FrancaModel(FrancaConfig(ViTConfig(**SHAPE, intermediate_size=24, hidden_dropout_prob=0.3), **SETTINGS))
    pixels = torch.randn((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    expected = model.eval().encode(pixels)
    accelerate.cpu_offload(model.train(), execution_device=torch.device("cpu"))
    assert np.allclose(model.encode(pixels), expected, atol=1e-6)
    forward = model.backbone.forward
    model.backbone.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"the forward of ViTModel was replaced .*; call model.eval\(\) first"):
        model.encode(pixels)
    assert np.allclose(model.eval().encode(pixels), expected, atol=1e-6)


def test_remote_code_in_a_fresh_process(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    model.teacher.save_backbone(tmp_path / "plain")
    pictures = [draw_picture(i % 2, i) for i in range(4)]
    np.save(tmp_path / "pictures.npy", np.stack(pictures))
    arguments = [str(tmp_path / name) for name in ("whole", "plain", "pictures.npy", "out.npz")]
    run_elsewhere(LOAD_ELSEWHERE, tmp_path, *arguments)
    got = np.load(tmp_path / "out.npz")
    expected = model.encode(pictures, dim=8)
    assert np.allclose(got["model"], expected, atol=1e-6)
    assert np.allclose(got["whole"], expected, atol=1e-6)
    plain = got["plain"][:, :8]
    assert np.allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), expected, atol=1e-5)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    model = tiny_model()
    model.teacher.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weights lack .* of the tensors of a pre-training model"):
        FrancaForPretraining.from_pretrained(tmp_path)


def test_encode_without_images_and_with_wrong_arguments():
    model = tiny_model()
    assert model.encode([], dim=4).shape == (0, 4)
    assert model.encode(torch.randn(3, 3, 16, 16), convert_to_tensor=True).shape == (3, 16)
    assert model.encode(torch.randn(2, 3, 24, 8)).shape == (2, 16), "images of another shape"
    for dim in (0, 17):
        with pytest.raises(ValueError, match=f"dim: {dim} is not allowed; use a whole number from 1 to 16"):
            model.encode([draw_picture(0, 0)], dim=dim)
    with pytest.raises(ValueError, match="batch_size: 0 is not allowed"):
        model.encode([draw_picture(0, 0)], batch_size=0)
    with pytest.raises(ValueError, match="pixel_values: images of 18x16 pixels are not allowed; both must be mult"):
        model.encode(torch.randn(2, 3, 18, 16))
    model.teacher.image_processor = None
    with pytest.raises(ValueError, match="image_processor: this model was not loaded from a folder"):
        model.encode([draw_picture(0, 0)])


WRONG = {
    "few prototypes": ({"num_prototypes": 5}, "num_prototypes: 5 leaves 1 for size 4 of 16; use at least 8"),
    "cold student": ({"student_temperature": 0.0}, "student_temperature: 0.0 is not allowed; use a number above 0"),
    "cold teacher": ({"teacher_temperature": -0.1}, "teacher_temperature: -0.1 is not allowed"),
    "cold start": ({"initial_teacher_temperature": 0}, "initial_teacher_temperature: 0 is not allowed"),
    "momentum": ({"momentum": 1.1}, "momentum: 1.1 is not allowed; use a number from 0 to 1"),
    "last momentum": ({"final_momentum": -0.5}, "final_momentum: -0.5 is not allowed"),
    "large size": ({"nesting_sizes": [4, 32]}, r"nesting_sizes: \[4, 32\] is not allowed; .* from 1 to 16"),
    "size of zero": ({"nesting_sizes": [0, 16]}, "nesting_sizes: "),
    "no size": ({"nesting_sizes": []}, "nesting_sizes: "),
    "a size twice": ({"nesting_sizes": [16, 16]}, "nesting_sizes: .* name each size once"),
    "a largest size below D": ({"nesting_sizes": [4, 8]}, "nesting_sizes: .* the largest must be the hidden size 16"),
    "head input": ({"head_input": "all"}, "head_input: 'all' is unknown; choose one of slice, projection"),
    "head output": ({"head_output": "relu"}, "head_output: 'relu' is unknown; choose one of unit, gelu"),
    "reduction": ({"koleo_reduction": "max"}, "koleo_reduction: 'max' is unknown; choose one of mean, sum"),
    "weight": ({"koleo_weight": -1}, "koleo_weight: -1 is not allowed; use a number of at least 0"),
    "iterations": ({"sinkhorn_iterations": 0}, "sinkhorn_iterations: 0 is not allowed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_out_of_range_is_refused(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"num_prototypes: .*; student_temperature: .*; momentum: "):
        tiny_config(num_prototypes=5, student_temperature=0, momentum=2)


def test_batches_that_cannot_be_trained_on_are_refused():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(ValueError, match="koleo_weight: a batch of 1 has no nearest neighbour"):
        model(**tiny_batch(1))
    assert torch.isfinite(tiny_model(koleo_weight=0.0)(**tiny_batch(1)).loss)
    with pytest.raises(ValueError, match="global_crops: images of 15x16 pixels are not allowed"):
        model(batch["global_crops"][..., :15, :])
    with pytest.raises(ValueError, match="local_crops: images of 8x6 pixels are not allowed"):
        model(batch["global_crops"], batch["local_crops"][..., :6])
    with pytest.raises(ValueError, match="global_crops: a single crop has no other crop to predict"):
        model(batch["global_crops"][:, :1])


def test_other_backbones_are_refused():
    with pytest.raises(
        ValueError, match="backbone_config: bert is not a vision transformer; use dinov2, dinov3_vit or vit"
    ):
        FrancaConfig({"model_type": "bert"})
    shape = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "image_size": 16, "patch_size": 2}
    swin = FrancaModel(FrancaConfig({"model_type": "swin", **shape}))
    with pytest.raises(ValueError, match="backbone: SwinModel gives 16 tokens for 8x8 patches; Franca needs a"):
        swin(torch.randn(1, 3, 16, 16))


def test_a_backbone_without_a_mask_token_trains_without_patches():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    backbone = Dinov2Config(**shape, use_mask_token=False)
    with pytest.raises(ValueError, match="patch_weight: Dinov2Model has no mask token"):
        FrancaForPretraining(FrancaConfig(backbone, **SETTINGS))
    model = FrancaForPretraining(FrancaConfig(backbone, patch_weight=0, **SETTINGS))
    assert torch.isfinite(model(**tiny_batch()).loss)
    with pytest.raises(ValueError, match="rasa: position is removed after training"):
        FrancaForPretraining(tiny_config(rasa=True))
