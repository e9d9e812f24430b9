"""The model before training as the teacher."""

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments

ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})


def make_trainer(model, folder, **kwargs) -> TwoDMSETrainer:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_tqdm": True, "logging_steps": 1, "teacher": "start",
    }  # fmt: skip
    args = TwoDMSETrainingArguments(output_dir=str(folder), sizes=LADDER, **(settings | kwargs))
    return TwoDMSETrainer(model=model, args=args, train_dataset=ROWS)


def drift(model, start) -> float:
    """The mean change of the similarities at the full size."""
    pairs = [torch.from_numpy(m.encode(SENTENCES)) for m in (model, start)]
    return (pairs[0] @ pairs[0].T - pairs[1] @ pairs[1].T).abs().mean().item()


def test_the_teacher_is_the_model_after_fitting_and_does_not_change(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, exit_projections=True)
    trainer.train()
    start = tiny_model()
    start.add_exit_projections()
    start.exit_projections.load_state_dict(trainer._start.exit_projections.state_dict())
    for name, value in trainer._start.named_parameters():
        assert torch.equal(value, dict(start.named_parameters())[name]), name
        assert not value.requires_grad
    assert not torch.equal(trainer._start.exit_projections[3].weight, torch.eye(32)), (
        "the projections were fitted before"
    )
    assert drift(trainer.encoder, start) > 1e-3, "the model has moved away from it"
    assert trainer.describe()["teacher"] == "start"


def test_the_teacher_holds_back_the_largest_size(tiny_model, tmp_path):
    drifts = {}
    for weight in (0.0, 30.0):
        model = tiny_model()
        make_trainer(model, tmp_path / str(weight), alignment_weight=weight).train()
        drifts[weight] = drift(model, tiny_model())
    assert drifts[30.0] < 0.7 * drifts[0.0]


def test_a_resumed_run_has_the_same_teacher(tiny_model, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole, resumed = tiny_model(), tiny_model()
    make_trainer(whole, tmp_path, **settings).train()
    make_trainer(resumed, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in whole.named_parameters():
        assert torch.equal(value, dict(resumed.named_parameters())[name]), name


def test_teachers_that_are_not_possible_are_refused(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="teacher: 'best' is unknown; choose one of largest, start"):
        make_trainer(tiny_model(), tmp_path, teacher="best")
    with pytest.raises(
        ValueError, match="teacher: start needs the alignment score_kl or query_kl, but the alignment is feature_kl"
    ):
        make_trainer(tiny_model(), tmp_path, alignment="feature_kl")
    with pytest.raises(ValueError, match="teacher: start needs all weights in one process"):
        make_trainer(get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")), tmp_path)
