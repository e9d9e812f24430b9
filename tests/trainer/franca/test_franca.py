"""Training with a teacher: its update, the schedules, views of images, resuming; and the evaluations."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_vision import FAMILIES, draw_picture, tiny_model

from modeling_franca import FrancaForPretraining
from trainer.franca.crops import MultiCrop, draw_box
from trainer.franca.evaluation import knn_accuracy, knn_by_size, pca_maps
from trainer.franca.trainer import FrancaTrainer, FrancaTrainingArguments


def pictures(count: int = 24) -> Dataset:
    rows = {"image": [draw_picture(i % 2, i) for i in range(count)], "index": list(range(count))}
    return Dataset.from_dict(rows)


def make_trainer(folder, model=None, **settings) -> FrancaTrainer:
    args = FrancaTrainingArguments(
        output_dir=str(folder),
        **{
            "local_crops_number": 2,
            "global_crop_size": 16,
            "local_crop_size": 8,
            "per_device_train_batch_size": 6,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        },
    )
    return FrancaTrainer(model=model or tiny_model(momentum=0.8), args=args, train_dataset=pictures())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_teacher_moves_once_per_step_on_the_schedule(accumulation, tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, per_device_train_batch_size=4
    )
    model, momenta, temperatures = trainer.model, [], []
    update, forward = model.update_teacher, model.forward
    monkeypatch.setattr(model, "update_teacher", lambda momentum: (momenta.append(momentum), update(momentum)))

    def watch(*args, teacher_temperature, **kwargs):
        assert not model.teacher.training
        temperatures.append(teacher_temperature)
        return forward(*args, teacher_temperature=teacher_temperature, **kwargs)

    monkeypatch.setattr(model, "forward", watch)
    first = [parameter.clone() for parameter in model.teacher.parameters()]
    trainer.train()
    assert momenta == [model.config.momentum_at(step / 3) for step in (1, 2, 3)]
    steps = [step for step in range(3) for _ in range(accumulation)]
    assert temperatures == [model.config.teacher_temperature_at(step / 3) for step in steps]
    assert any(not torch.equal(a, b) for a, b in zip(first, model.teacher.parameters(), strict=True))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        cls, patch = ([entry[f"{kind}/{size}"] for size in (4, 8, 16)] for kind in ("loss_cls", "loss_patch"))
        assert entry["loss"] == pytest.approx(np.mean(cls) + np.mean(patch) + 0.1 * entry["koleo"], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_an_uninterrupted_one(family, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", tiny_model(family, momentum=0.8), **saving)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    torch.manual_seed(77)  # not the random state of the first run
    resumed = make_trainer(tmp_path / "again", tiny_model(family, seed=5, momentum=0.8), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert sum((value - start[name]).abs().max() > 1e-3 for name, value in expected.items()) > 40
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e and e["step"] > 3] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_trained_weights_are_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    again = FrancaForPretraining.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters(), strict=True))


def views(**settings) -> MultiCrop:
    return MultiCrop(
        (4, 4), [0.5] * 3, [0.25] * 3, **{"local_crops": 3, "global_size": 16, "local_size": 8, **settings}
    )


def test_views_have_their_shapes_masks_and_normalization():
    examples = [{"image": draw_picture(i % 2, i), "index": i} for i in range(40)]
    batch = views(mask_ratio=0.25)(examples)
    assert batch["global_crops"].shape == (40, 2, 3, 16, 16)
    assert batch["local_crops"].shape == (40, 3, 3, 8, 8)
    assert batch["mask"].shape == (40, 2, 16)
    counts = batch["mask"].sum(dim=2).flatten()
    assert set(counts.tolist()) == {0, 4}
    assert 0.3 < (counts > 0).float().mean() < 0.7
    assert batch["global_crops"].min() >= -2
    assert batch["global_crops"].max() <= 2
    assert set(views(mask_probability=0.0, local_crops=0)(examples)) == {"global_crops"}


def test_the_masked_fraction_is_drawn_between_two_ratios():
    examples = [{"image": draw_picture(i % 2, i), "index": i} for i in range(40)]
    counts = views(mask_ratio=0.1, max_mask_ratio=0.65, mask_probability=1.0)(examples)["mask"].sum(dim=2).flatten()
    expected = {round(0.1 * 16) + step for step in range(round(0.65 * 16) - round(0.1 * 16) + 1)}
    assert set(counts.tolist()) == expected
    assert 0.3 < counts.float().mean() / 16 < 0.45


def test_views_are_a_function_of_seed_epoch_and_index():
    examples = [{"image": draw_picture(i % 2, i), "index": i} for i in range(6)]
    maker = views()
    first, single = maker(examples), views()(examples[4:5])
    for batch in (first, single):
        assert torch.equal(batch.pop("masked"), torch.where(batch["mask"].flatten())[0])
    for name in first:
        assert torch.equal(first[name][4:5], single[name]), "views depend on the rest of the batch"
    assert not torch.equal(first["global_crops"][:, 0], first["global_crops"][:, 1])
    maker.epoch = 1
    assert not torch.equal(maker(examples)["global_crops"], first["global_crops"])
    assert not torch.equal(views(seed=1)(examples)["mask"], first["mask"])


def test_boxes_take_their_fraction_of_the_image():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box((80, 60), (0.1, 0.4), rng) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = width * height / 4800
    assert share.min() >= 0.1 - 1e-9
    assert share.max() <= 0.4
    assert share.mean() == pytest.approx(0.25, abs=0.01)
    assert (width / height).min() < 0.78
    assert (width / height).max() > 1.28
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 80
    assert boxes[:, 3].max() <= 60
    assert draw_box((30, 300), (1.0, 1.0), rng)[2] <= 30, "a narrow image"


WRONG = {
    "mask ratios": (
        {"max_mask_ratio": 0.4},
        "max_mask_ratio: 0.4 is not allowed; use a number from mask_ratio",
    ),
    "mask ratio": ({"mask_ratio": 1.0}, "mask_ratio: 1.0 is not allowed; use a number from 0 to below 1"),
    "mask fraction": ({"mask_probability": 1.5}, "mask_probability: .* numbers from 0 to 1"),
    "scale": ({"global_crop_scale": [0.8, 0.2]}, "global_crop_scale: .* the lowest first"),
    "three numbers": ({"local_crop_scale": [0.1, 0.2, 0.3]}, "local_crop_scale: .* give two numbers"),
    "one crop": ({"global_crops_number": 1, "local_crops_number": 0}, "global_crops_number: 1 crop has no other crop"),
    "global crops": ({"global_crop_size": 18}, "global_crop_size: 18 is not allowed; use a multiple of the patch size"),
    "local crops": ({"local_crop_size": 10}, "local_crop_size: 10 is not allowed"),
    "one image": ({"per_device_train_batch_size": 1}, "koleo_weight: a batch of 1 has no nearest neighbour"),
    "few images": ({"per_device_train_batch_size": 25}, "per_device_train_batch_size: a step takes 25 images"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name, tmp_path):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **change)


def test_knn_equals_a_simple_vote():
    rng = np.random.default_rng(0)
    train, labels = rng.normal(size=(30, 6)), rng.integers(0, 3, 30)
    test, truth = rng.normal(size=(50, 6)), rng.integers(0, 3, 50)
    hits = 0
    for query, label in zip(test, truth, strict=True):
        cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for index in np.argsort(-cosine)[:7]:
            votes[labels[index]] += np.exp(cosine[index] / 0.07)
        hits += votes.argmax() == label
    assert knn_accuracy(train, labels, test, truth, k=7) == hits / 50
    assert 0 < hits < 50
    assert knn_accuracy(train, labels, train, labels, k=100) <= 1, "more neighbors than images"
    by_size = knn_by_size([2, 6], train, labels, test, truth, k=7)
    assert by_size["6"] == hits / 50
    assert by_size["2"] == knn_accuracy(train[:, :2], labels, test[:, :2], truth, k=7)


def test_pca_maps_show_the_largest_directions():
    features = torch.zeros(2, 6, 5)
    features[..., 3] = torch.arange(12.0).view(2, 6)
    maps = pca_maps(features + 1e-3 * torch.randn_like(features), (2, 3))
    assert maps.shape == (2, 2, 3, 3)
    assert (maps >= 0).all()
    assert (maps <= 1).all()
    ramp = maps[..., 0].ravel()
    assert np.allclose(ramp if ramp[0] < ramp[-1] else ramp[::-1], np.arange(12) / 11, atol=0.01)
