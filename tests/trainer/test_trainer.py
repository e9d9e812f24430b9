"""TwoDMSETrainer: learning, logs, accumulation, resuming, mixed precision, adapters, two processes."""

import json
import os

import pytest
import torch
from conftest import LADDER, LEAVE, SENTENCES, cpu_environment, run_processes
from datasets import Dataset
from forking import ForkedScript, finish

from modeling_2dmse import TwoDMSEModel
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.shared.arguments import cpu_has_bf16

PAIRS = Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]})
TRIPLETS = Dataset.from_dict(
    {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2], "negative": SENTENCES[3::2] + SENTENCES[1:2]}
)
SCORED = Dataset.from_dict(
    {"sentence1": SENTENCES[::2], "sentence2": SENTENCES[1::2], "score": [0.1 * i for i in range(10)]}
)


def arguments(folder, **kwargs) -> TwoDMSETrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "sizes": LADDER,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "seed": 0,
    }
    return TwoDMSETrainingArguments(**(defaults | kwargs))


def train(model, folder, data=TRIPLETS, **kwargs):
    trainer = TwoDMSETrainer(model=model, args=arguments(folder, **kwargs), train_dataset=data)
    trainer.train()
    return trainer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("objective", ["2dmse", "starbucks", "matryoshka", "espresso", "separate"])
def test_every_parameter_learns_and_the_loss_falls(objective, tiny_model, tmp_path):
    model = tiny_model()
    before = weights(model)
    trainer = train(model, tmp_path, objective=objective, max_steps=30, compression_dim=16, learning_rate=3e-3)
    # some rows of the embeddings are never used, but every tensor must have moved
    still = [name for name, value in weights(model).items() if torch.equal(value, before[name])]
    assert still == []
    losses = [entry["loss/4x32"] for entry in trainer.state.log_history if "loss/4x32" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_each_size_is_logged_and_adds_up(tiny_model, tmp_path):
    trainer = train(tiny_model(), tmp_path, alignment="score_kl", logging_steps=2)
    entry = trainer.state.log_history[0]
    parts = [value for name, value in entry.items() if name.startswith(("loss/", "alignment/"))]
    assert len(parts) == 5
    assert sum(parts) == pytest.approx(entry["loss"], abs=2e-3)


def test_crossed_sizes_are_trained_and_logged(tiny_model, tmp_path):
    trainer = train(tiny_model(), tmp_path, alignment="none", logging_steps=2, cross_size_weight=0.5)
    entry = trainer.state.log_history[0]
    parts = {name: value for name, value in entry.items() if name.startswith(("loss/", "cross/"))}
    assert {name for name in parts if name.startswith("cross/")} == {"cross/1x8", "cross/2x16"}
    weighted = sum(value * (0.5 if name.startswith("cross/") else 1) for name, value in parts.items())
    assert weighted == pytest.approx(entry["loss"], abs=2e-3)
    args = arguments(tmp_path, objective="separate", cross_size_weight=1.0)
    with pytest.raises(ValueError, match="cross_size_weight: separate trains no shallower size"):
        TwoDMSETrainer(model=tiny_model(), args=args, train_dataset=TRIPLETS)


def test_unlabeled_texts_are_trained_on_and_logged(tiny_model, tmp_path):
    """With a very large weight, the similarities of these texts at a small size approach those at the full size."""
    far = {}
    for weight in (1e-9, 1e3):
        model = tiny_model()
        args = arguments(tmp_path / str(weight), unlabeled_weight=weight, max_steps=40, learning_rate=3e-3)
        trainer = TwoDMSETrainer(model=model, args=args, train_dataset=TRIPLETS, unlabeled_texts=SENTENCES[:8])
        trainer.train()
        small, full = (torch.from_numpy(model.encode(SENTENCES[:8], n, d)) for n, d in ((1, 8), (4, 32)))
        far[weight] = (small @ small.T - full @ full.T).abs().mean().item()
    assert far[1e3] < 0.5 * far[1e-9]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"unlabeled/1x8", "unlabeled/2x16", "alignment/1x8"} < set(entry)
    assert trainer.describe()["weight on unlabeled texts"] == 1e3
    assert "weight on unlabeled texts" not in train(tiny_model(), tmp_path / "usual").describe()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"alignment": "none"},
            "unlabeled_texts: starbucks learns nothing from them with the alignment none and unlabeled_weight",
        ),
        ({"unlabeled_weight": 0.0}, "with the alignment score_kl and unlabeled_weight 0"),
        ({"objective": "separate"}, "unlabeled_texts: separate learns nothing from them"),
        ({"per_device_train_batch_size": 64}, "unlabeled_texts: there are 20, fewer than the 64 of one batch"),
    ],
)
def test_unlabeled_texts_without_effect_are_refused(kwargs, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        TwoDMSETrainer(tiny_model(), arguments(tmp_path, **kwargs), TRIPLETS, unlabeled_texts=SENTENCES)


def test_all_columns_go_through_one_call_of_the_wrapped_model(tiny_model, tmp_path):
    model, calls = tiny_model(), []
    trainer = TwoDMSETrainer(model=model, args=arguments(tmp_path, num_buckets=2), train_dataset=TRIPLETS)
    batch = next(iter(trainer.get_train_dataloader()))

    class Wrapped(torch.nn.Module):
        def forward(self, **inputs):
            calls.append(inputs["input_ids"].shape[0])
            return model(**inputs)

    loss = trainer.compute_loss(Wrapped(), batch)
    assert calls == [12]
    assert loss.requires_grad


@pytest.mark.parametrize("objective", ["separate", "matryoshka"])
def test_accumulated_batches_equal_one_large_batch(objective, tiny_model, tmp_path):
    """cosine_mse does not couple rows, and plain SGD has no state: 4 batches of 2 must equal one batch of 8."""
    data = SCORED.select(range(8))
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        model = tiny_model()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        settings = {"objective": objective, "loss": "cosine_mse", "optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
        settings |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0}
        model.backbone.config._attn_implementation = "eager"  # here attention dropout is a module, set to 0 above
        before = weights(model)
        trainer = train(
            model, tmp_path, data, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential", **settings,
        )  # fmt: skip
        results.append((weights(model), trainer.state.log_history[0]["loss"]))
    assert any(not torch.equal(results[0][0][name], before[name]) for name in before)
    for name, value in results[0][0].items():
        assert torch.allclose(value, results[1][0][name], atol=1e-6), name
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)


def test_accumulation_of_a_loss_that_couples_rows_is_the_mean_of_its_batches(tiny_model, tmp_path):
    """infonce sees only the negatives of its own batch: accumulating 2 batches averages their two losses."""
    trainer = train(
        tiny_model(), tmp_path, PAIRS.select(range(8)), gradient_accumulation_steps=2, max_steps=1,
        learning_rate=0.0, train_sampling_strategy="sequential", alignment="none", objective="separate",
    )  # fmt: skip
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["loss/4x32"], abs=1e-4)


def test_resumed_equals_uninterrupted(tiny_model, tmp_path):
    settings = {"objective": "2dmse", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, half = tiny_model(), tiny_model()
    train(whole, tmp_path / "a", **settings)
    resumed = TwoDMSETrainer(model=half, args=arguments(tmp_path / "b", **settings), train_dataset=TRIPLETS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(half)[name]), name


def test_checkpoints_are_model_folders(tiny_model, tmp_path):
    model = tiny_model()
    train(model, tmp_path, save_strategy="steps", save_steps=6)
    loaded = TwoDMSEModel.from_pretrained(tmp_path / "checkpoint-6", num_layers=2)
    assert loaded.encode(SENTENCES[:3]) == pytest.approx(model.encode(SENTENCES[:3], num_layers=2), abs=1e-6)


def test_the_best_checkpoint_is_selected_by_the_mean_over_the_ladder(tiny_model, tmp_path):
    model = tiny_model()
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=5,
        load_best_model_at_end=True, learning_rate=5e-3,
    )  # fmt: skip
    trainer = TwoDMSETrainer(model=model, args=args, train_dataset=TRIPLETS, eval_dataset=SCORED)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_ladder_mean" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    for entry in entries:
        sizes = [entry[f"eval_spearman_{size}"] for size in LADDER]
        assert entry["eval_ladder_mean"] == pytest.approx(sum(sizes) / 3)
    best = max(entries, key=lambda entry: entry["eval_ladder_mean"])
    assert trainer.evaluate()["eval_ladder_mean"] == pytest.approx(best["eval_ladder_mean"], abs=1e-6)


def test_retrieval_evaluation_of_pairs(tiny_model, tmp_path):
    trainer = TwoDMSETrainer(model=tiny_model(), args=arguments(tmp_path), train_dataset=PAIRS, eval_dataset=TRIPLETS)
    metrics = trainer.evaluate()
    assert {f"eval_ndcg@10_{size}" for size in LADDER} <= set(metrics)
    assert 0 < metrics["eval_ladder_mean"] <= 1


@pytest.mark.parametrize("loss", ["cosent", "angle", "cosine_mse"])
def test_scored_pairs(loss, tiny_model, tmp_path):
    trainer = train(tiny_model(), tmp_path, SCORED, loss=loss)
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.args.loss == loss


def test_cosine_mse_scales_scores_to_one(tiny_model, tmp_path):
    scored = Dataset.from_dict({"sentence1": SENTENCES[:4], "sentence2": SENTENCES[4:8], "score": [0.0, 5.0, 2.5, 1.0]})
    trainer = TwoDMSETrainer(model=tiny_model(), args=arguments(tmp_path, loss="cosine_mse"), train_dataset=scored)
    assert trainer.train_dataset["score"][:] == [0.0, 1.0, 0.5, 0.2]


def test_default_loss_follows_the_columns(tiny_model, tmp_path):
    for data, loss in ((PAIRS, "infonce"), (TRIPLETS, "infonce"), (SCORED, "cosent")):
        trainer = TwoDMSETrainer(model=tiny_model(), args=arguments(tmp_path), train_dataset=data)
        assert trainer.args.loss == loss


@pytest.mark.parametrize("family", ["roberta", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_other_families_train(family, tiny_model, tmp_path):
    model = tiny_model(family)
    before = weights(model)
    train(model, tmp_path, max_steps=2, gradient_checkpointing=family == "qwen3")
    assert all(not torch.equal(value, before[name]) for name, value in weights(model).items())


def test_bf16_keeps_the_loss_in_float32(tiny_model, tmp_path):
    trainer = TwoDMSETrainer(model=tiny_model(), args=arguments(tmp_path, bf16=True), train_dataset=TRIPLETS)
    trainer.train()
    seen = []
    model, _ = trainer.accelerator.prepare(tiny_model(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    model.backbone.encoder.layer[0].attention.self.query.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    assert seen[0] == torch.bfloat16
    assert loss.dtype == torch.float32


def test_bf16_default_follows_the_cpu(tmp_path, monkeypatch):
    import trainer.shared.arguments as module

    for capable in (True, False):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda capable=capable: capable)
        assert arguments(tmp_path, bf16=None).bf16 is capable
        # transformers refuses bf16 on a machine without a GPU, unless use_cpu is set
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        without_gpu = arguments(tmp_path, bf16=None, use_cpu=False)
        assert (without_gpu.bf16, without_gpu.use_cpu) == (capable, capable)
        assert arguments(tmp_path, bf16=True, use_cpu=False).use_cpu is True
        assert arguments(tmp_path, bf16=False).bf16 is False
    assert isinstance(cpu_has_bf16(), bool)


def test_tensorboard_gets_every_size(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    train(tiny_model(), tmp_path, report_to="tensorboard", max_steps=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "runs").rglob("events*")).parent))
    events.Reload()
    assert {f"train/loss/{size}" for size in LADDER} <= set(events.Tags()["scalars"])


def test_lora_trains_only_adapters_and_merges(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    base = weights(model)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trainer = train(peft_model, tmp_path, learning_rate=1e-2)
    adapted = trainer.encoder.encode(SENTENCES[:4])
    with pytest.raises(ValueError, match="merge them first"):
        trainer.encoder.truncate(2)
    merged = peft_model.merge_and_unload()
    assert isinstance(merged, TwoDMSEModel)
    assert torch.equal(
        merged.backbone.embeddings.word_embeddings.weight, base["backbone.embeddings.word_embeddings.weight"]
    )
    assert merged.encode(SENTENCES[:4]) == pytest.approx(adapted, abs=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert TwoDMSEModel.from_pretrained(tmp_path / "merged").encode(SENTENCES[:4]) == pytest.approx(adapted, abs=1e-5)


def test_push_to_hub_of_the_trainer_writes_the_card_of_this_project(tiny_model, tmp_path):
    trainer = TwoDMSETrainer(model=tiny_model(), args=arguments(tmp_path), train_dataset=PAIRS, eval_dataset=SCORED)
    trainer.create_model_card(model_name="org/name", tags=["x"])
    text = (tmp_path / "README.md").read_text()
    assert "| 4x32 |" in text
    assert "# org/name" in text
    trainer.create_model_card(model_name="other")
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (PAIRS, {"loss": "cosent"}, "loss: cosent does not fit the columns"),
        (SCORED, {"loss": "infonce"}, "loss: infonce does not fit the columns"),
        (PAIRS, {"sizes": ["5x8"]}, "5x8 asks for 5 layers"),
        (PAIRS, {"sizes": []}, "the ladder is empty"),
        (PAIRS, {"objective": "espresso", "compression_dim": 64}, "compression_dim: 64 is not allowed"),
        (SCORED, {"loss": "angle", "sizes": ["1x7"]}, "1x7 has an odd dim"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(data, kwargs, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        TwoDMSETrainer(model=tiny_model(), args=arguments(tmp_path, **kwargs), train_dataset=data)


def test_unknown_names_are_collected_in_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"objective: 'x' is unknown.*alignment: 'y' is unknown.*max_length: 1 is not"):
        arguments(tmp_path, objective="x", alignment="y", max_length=1)


TWO_PROCESSES = """
import json, sys, torch
sys.path.insert(0, sys.argv[3])
from datasets import Dataset
from modeling_2dmse import TwoDMSEModel
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
rows = json.load(open(sys.argv[2]))
model = TwoDMSEModel.from_pretrained(sys.argv[1])
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
model.backbone.config._attn_implementation = "eager"
args = TwoDMSETrainingArguments(
    output_dir=sys.argv[4], sizes=["1x8", "4x32"], per_device_train_batch_size=int(sys.argv[5]), max_steps=2,
    learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0, loss="cosine_mse",
    alignment="none", objective=sys.argv[6], bf16=False, use_cpu=True, report_to="none", save_strategy="no",
    disable_tqdm=True, train_sampling_strategy="sequential",
)
trainer = TwoDMSETrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows))
trainer.train()
trainer.save_model()
"""


def test_two_processes_equal_one_for_a_loss_that_does_not_couple_rows(tiny_model, tmp_path):
    """Two gloo processes with batches of 4 draw the same sizes and synchronize their gradients: the weights are those
    of batches of 8."""
    tiny_model().save_pretrained(tmp_path / "start")
    rows = {"sentence1": SENTENCES[:16], "sentence2": SENTENCES[4:20], "score": [i / 16 for i in range(16)]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.py").write_text(TWO_PROCESSES + LEAVE)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    shared = [str(tmp_path / "start"), str(tmp_path / "rows.json"), root]
    alone = [*shared, str(tmp_path / "one"), "8", "2dmse"]
    finish([ForkedScript(tmp_path / "run.py", alone, cpu_environment(), tmp_path / "one.log")])
    run_processes(2, tmp_path / "run.py", *shared, str(tmp_path / "two"), "4", "2dmse")
    start, one, two = (weights(TwoDMSEModel.from_pretrained(tmp_path / name)) for name in ("start", "one", "two"))
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
