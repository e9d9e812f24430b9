"""M3Trainer: a step has the gradient of the averaged loss, one run of the tower and the memory of one level."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import LEAVE, run_processes
from transformers import TrainerCallback

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration
from run_scripts.digits_m3 import digit_tables
from run_scripts.shared.measure import allocated_at_peak
from trainer.m3.conversations import check_conversations
from trainer.m3.trainer import M3Trainer, M3TrainingArguments

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def digits():
    return check_conversations(digit_tables()["train"].select(range(12)))


@pytest.fixture
def make_trainer(tiny_m3, llava_processor, digits, tmp_path):
    """A function from configuration fields and arguments to a trainer on digits."""

    def make(config=None, **kwargs) -> M3Trainer:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
        }
        trainer = M3Trainer(
            model=tiny_m3(**(config or {})),
            args=M3TrainingArguments(**(defaults | kwargs)),
            train_dataset=digits,
            eval_dataset=digits.select(range(5)),
            processing_class=llava_processor,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def batch_of(trainer: M3Trainer, indices=range(4)) -> dict:
    return trainer.data_collator([trainer.train_dataset[index] for index in indices])


def separate_losses(model, batch: dict) -> dict[int, torch.Tensor]:
    """The loss of each level from the pixels, with the model's own forward pass."""
    return {
        size: model(**level, pixel_values=batch["pixel_values"], num_visual_tokens=size).loss
        for size, level in batch["levels"].items()
    }


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: dict, expected: dict, rtol: float = 1e-4) -> None:
    assert set(ours) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=rtol, atol=1e-6, msg=name)


CASES = {
    "after": {},
    "before": {"pool_position": "before_projector"},
    "weighted": {"scale_loss_weights": [1.0, 2.0, 5.0]},
    "without the full grid": {"visual_token_sizes": [1, 9]},
    "one level": {"visual_token_sizes": [9]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_gradient_of_the_mean_over_levels(name, make_trainer):
    trainer = make_trainer(CASES[name])
    model, batch = trainer.model, batch_of(trainer)
    weights = model.config.scale_loss_weights or [1.0] * len(batch["levels"])
    losses = separate_losses(model, batch)
    expected_loss = sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)) / sum(weights)
    expected_loss.backward()
    expected = gradients(model)
    assert len({round(loss.item(), 4) for loss in losses.values()}) == len(losses), (
        "the levels must have different losses"
    )
    loss = trainer.training_step(model, batch)
    torch.testing.assert_close(loss, expected_loss.detach(), atol=1e-6, rtol=0)
    assert_same(gradients(model), expected)
    tower = [key for key in expected if "vision_tower" in key and expected[key].abs().max() > 1e-4]
    assert len(tower) > 10, "the gradient must reach the tower"


@pytest.mark.parametrize("frozen", [False, True])
def test_the_tower_runs_once_and_does_not_change_when_frozen(frozen, make_trainer):
    trainer = make_trainer(freeze_vision_tower=frozen)
    calls = {"tower": 0, "language": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    trainer.model.model.vision_tower.register_forward_hook(count("tower"))
    trainer.model.model.language_model.register_forward_hook(count("language"))
    batch = batch_of(trainer)
    trainer.training_step(trainer.model, batch)
    assert calls == {"tower": 1, "language": 3}
    ours = gradients(trainer.model)
    assert any("vision_tower" in name for name in ours) is not frozen
    sum(separate_losses(trainer.model, batch).values()).div(3).backward()
    assert_same(ours, gradients(trainer.model))


def test_accumulated_batches_are_not_scaled(make_trainer):
    """In Trainer's own loop, two micro-batches give the mean of their gradients."""
    trainer = make_trainer(
        gradient_accumulation_steps=2,
        max_steps=1,
        per_device_train_batch_size=6,
        max_grad_norm=0.0,
        eval_strategy="no",
        train_sampling_strategy="sequential",
    )
    model, caught = trainer.model, {}
    batches = [batch_of(trainer, range(6)), batch_of(trainer, range(6, 12))]
    for batch in batches:
        (sum(separate_losses(model, batch).values()) / 3 / 2).backward()
    expected = gradients(model)

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            caught.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Catch())
    trainer.train()
    assert_same(caught, expected)


def test_checkpointed_activations_give_the_same_step(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer)
    trainer.training_step(trainer.model, batch)
    expected = gradients(trainer.model)
    trainer.model.gradient_checkpointing_enable()
    trainer.training_step(trainer.model, batch)
    assert_same(gradients(trainer.model), expected)


def test_bf16_follows_float32(make_trainer):
    plain, mixed = make_trainer(), make_trainer(bf16=True)
    steps = []
    for trainer in (plain, mixed):
        trainer.training_step(trainer.model, batch_of(trainer))
        steps.append(torch.cat([g.flatten() for g in gradients(trainer.model).values()]))
    assert not torch.equal(*steps)
    assert torch.cosine_similarity(*steps, dim=0) > 0.99


def test_the_peak_memory_is_that_of_one_level(make_trainer):
    """The levels have similar lengths, so the memory of both together would be clearly higher."""
    sizes = {"levels": [4, 36], "largest": [36]}
    peaks = {}
    for name, levels in sizes.items():
        trainer = make_trainer({"visual_token_sizes": levels})
        batch = batch_of(trainer, [*range(12)] * 4)
        trainer.training_step(trainer.model, batch)  # allocates the gradients
        peaks[name] = allocated_at_peak(lambda t=trainer, b=batch: t.training_step(t.model, b))
    trainer = make_trainer({"visual_token_sizes": [4, 36]})
    batch = batch_of(trainer, [*range(12)] * 4)
    both = lambda: (sum(separate_losses(trainer.model, batch).values()) / 2).backward()
    both()
    assert allocated_at_peak(both) > 1.2 * peaks["largest"]
    assert peaks["levels"] < 1.1 * peaks["largest"]


def test_rows_without_images_are_trained_on_too(make_trainer):
    trainer = make_trainer()
    row = {"images": [], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "two"}]}
    batch = trainer.data_collator([row])
    loss = trainer.training_step(trainer.model, batch)
    expected = trainer.model(**batch["levels"][1]).loss
    torch.testing.assert_close(loss, expected.detach())


def test_levels_are_evaluated_and_logged(make_trainer):
    trainer = make_trainer({"scale_loss_weights": [1.0, 1.0, 2.0]}, logging_steps=1, per_device_eval_batch_size=2)
    trainer.train()
    names = {"loss/1", "loss/9", "loss/36"}
    assert [entry["step"] for entry in trainer.state.log_history if names <= set(entry)] == [1, 2]
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(5)])
    losses = separate_losses(trainer.model, batch)
    for size, loss in losses.items():
        assert metrics[f"eval_loss_{size}"] == pytest.approx(loss.item(), abs=1e-5)
        assert 0 <= metrics[f"eval_accuracy_{size}"] <= 1
    assert metrics["eval_loss"] == pytest.approx((losses[1] + losses[9] + 2 * losses[36]).item() / 4, abs=1e-5)


def test_wrong_arguments_are_refused(make_trainer):
    with pytest.raises(ValueError, match="visual_token_sizes: 4 and 9 do not nest"):
        make_trainer(visual_token_sizes=[4, 9])
    with pytest.raises(ValueError, match="scale_loss_weights: there are 2 for 3 visual_token_sizes"):
        make_trainer(scale_loss_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="max_length: 3 is not allowed; use a number of at least 8"):
        make_trainer(max_length=3)


TWO_PROCESSES = """
import sys
import torch
from run_scripts.digits_m3 import digit_tables
from trainer.m3.conversations import check_conversations
from trainer.m3.trainer import M3Trainer, M3TrainingArguments
from modeling_m3 import MatryoshkaLlavaForConditionalGeneration, MatryoshkaLlavaProcessor

args = M3TrainingArguments(
    output_dir=sys.argv[2], per_device_train_batch_size=int(sys.argv[4]), max_steps=2, save_strategy="no", bf16=False,
    use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-3, max_grad_norm=0.0, optim="sgd",
    train_sampling_strategy="sequential", lr_scheduler_type="constant", warmup_steps=0,
)
rows = check_conversations(digit_tables()["train"].select(range(8)))
model = MatryoshkaLlavaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = MatryoshkaLlavaProcessor.from_pretrained(sys.argv[1])
trainer = M3Trainer(model=model, args=args, train_dataset=rows, processing_class=processor)
trainer.train()
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), sys.argv[3])
"""


def test_two_processes_equal_one(llava_path, tmp_path, monkeypatch):
    """Two optimizer steps with gradients that are exchanged once, with the last level, equal those of one process."""
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + TWO_PROCESSES)
    paths = {name: [str(tmp_path / name), str(tmp_path / f"{name}.pt")] for name in ("one", "two")}
    monkeypatch.setattr(sys, "argv", [str(script), llava_path, *paths["one"], "4"])
    runpy.run_path(str(script))
    script.write_text(script.read_text() + LEAVE)
    run_processes(2, script, llava_path, *paths["two"], "2")
    start = MatryoshkaLlavaForConditionalGeneration.from_pretrained(llava_path).state_dict()
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    for part in ("vision_tower.encoder.layers.0", "multi_modal_projector", "language_model", "lm_head"):
        assert max((one[n] - start[n]).abs().max() for n in one if part in n) > 1e-6, f"{part} must have changed"
    for name, value in one.items():
        torch.testing.assert_close(two[name] - start[name], value - start[name], rtol=1e-3, atol=2e-7, msg=name)
