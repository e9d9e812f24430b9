"""SmaeTrainer: learning, metrics per size, accumulation, resuming with rows, blocks and streams, two processes."""

import pytest
import torch
from conftest import LADDER, LEAVE, SENTENCES, run_processes
from datasets import Dataset
from transformers import TrainerCallback

from modeling_2dmse import StarbucksForMaskedAutoencoding
from trainer.smae.arguments import SmaeTrainingArguments
from trainer.smae.corpus import endless, pack
from trainer.smae.trainer import PARTS, SmaeTrainer

TEXTS = Dataset.from_dict({"text": [f"{a} and {b}" for a, b in zip(SENTENCES, reversed(SENTENCES), strict=True)]})


def arguments(folder, **kwargs) -> SmaeTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "max_length": 24,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "seed": 0,
    }
    return SmaeTrainingArguments(**(defaults | kwargs))


@pytest.fixture
def tiny_smae(backbone_path):
    return lambda family="bert": StarbucksForMaskedAutoencoding.from_backbone(backbone_path(family), sizes=LADDER)


def _texts(kind: str, model):
    blocks = lambda table: pack(table, model.encoder.tokenizer, 24)
    if kind == "rows":
        return TEXTS
    if kind == "packed":
        return blocks(TEXTS)
    stream = TEXTS.to_iterable_dataset()
    return endless(blocks(stream) if kind == "packed stream" else stream, seed=0, buffer_size=8)


class Catch(TrainerCallback):
    """Copies the gradients before the optimizer step."""

    def __init__(self, model):
        self.model = model

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_parameter_learns_and_every_size_is_logged(tiny_smae, tmp_path):
    torch.manual_seed(0)
    model = tiny_smae()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    few = TEXTS.select(range(6))
    args = arguments(tmp_path, max_steps=150, learning_rate=5e-3, per_device_train_batch_size=6, eval_strategy="no")
    trainer = SmaeTrainer(model=model, args=args, train_dataset=few, eval_dataset=few)
    start = trainer.evaluate()
    trainer.train()
    for name, value in model.named_parameters():
        assert not torch.equal(value, before[name]), name
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {f"{part}/{size}" for part in PARTS for size in LADDER} <= set(entry)
    mean = sum(entry[f"loss_mlm/{size}"] + entry[f"loss_mae/{size}"] for size in LADDER) / 2 / len(LADDER)
    assert entry["loss"] == pytest.approx(mean, abs=1e-3)
    end = trainer.evaluate()
    for size in LADDER:
        for kind in ("mlm", "mae"):
            assert end[f"eval_accuracy_{kind}_{size}"] > end[f"eval_unigram_{kind}"] + 0.05, (kind, size)
            assert end[f"eval_loss_{kind}_{size}"] < start[f"eval_loss_{kind}_{size}"]


def test_evaluation_is_the_mean_over_all_masked_tokens_and_the_same_each_time(tiny_smae, tmp_path):
    model = tiny_smae()
    trainer = SmaeTrainer(model=model, args=arguments(tmp_path), eval_dataset=TEXTS)
    first = trainer.evaluate()
    trainer.data_collator.epoch = 5
    assert trainer.evaluate() == first
    assert trainer.data_collator.epoch == 5
    assert not trainer.data_collator.hides_all
    trainer.data_collator.epoch, trainer.data_collator.hides_all = 0, True
    batches = list(trainer.get_eval_dataloader())
    for batch in batches:
        masked = batch["labels"] != -100
        assert (batch["input_ids"][masked] == model.encoder.tokenizer.mask_token_id).all()
    with torch.no_grad():
        outputs = [model.eval()(**batch) for batch in batches]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    weighted = sum(out.accuracy_mlm[1] * count for out, count in zip(outputs, counts, strict=True)) / sum(counts)
    assert len(batches) == 1 or len(set(counts)) > 1
    assert first[f"eval_accuracy_mlm_{LADDER[1]}"] == pytest.approx(weighted.item())
    labels = torch.cat([batch["decoder_labels"][batch["decoder_labels"] != -100] for batch in batches])
    assert first["eval_unigram_mae"] == pytest.approx(labels.bincount().max().item() / len(labels))


def test_evaluation_moves_the_progress_bar(tiny_smae, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            seen.append(len(eval_dataloader))

    args = arguments(tmp_path, per_device_eval_batch_size=4)
    SmaeTrainer(model=tiny_smae(), args=args, eval_dataset=TEXTS.select(range(10)), callbacks=[Watch()]).evaluate()
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("kind", ["rows", "packed", "stream", "packed stream"])
def test_resumed_equals_uninterrupted(kind, tiny_smae, tmp_path):
    """Also past the end of the data: 8 steps of 4 rows read the 20 texts more than once."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole, half = tiny_smae(), tiny_smae()
    first = SmaeTrainer(model=whole, args=arguments(tmp_path / "a", **settings), train_dataset=_texts(kind, whole))
    first.train()
    for step in (3, 6):
        args = arguments(tmp_path / f"b{step}", **settings)
        second = SmaeTrainer(model=half, args=args, train_dataset=_texts(kind, half))
        second.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert len(_losses(first)) == 8
        assert _losses(second) == pytest.approx(_losses(first), abs=1e-6)
        for ours, theirs in zip(half.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_accumulation_averages_the_batches(tiny_smae, tmp_path):
    """One step of 2 x 4 rows: the mean of the two batches' gradients, not their sum."""
    model = tiny_smae()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0, learning_rate=0.0)
    trainer = SmaeTrainer(model=model, args=args, train_dataset=TEXTS)
    caught, seen = Catch(model), []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.add_callback(caught)
    trainer.train()
    model.zero_grad()
    (sum(model(**inputs).loss for inputs in seen[:2]) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(caught.gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_bf16_learns(tiny_smae, tmp_path):
    model = tiny_smae()
    trainer = SmaeTrainer(model=model, args=arguments(tmp_path, bf16=True), train_dataset=TEXTS)
    trainer.train()
    assert all(loss > 0 for loss in _losses(trainer))
    assert model.head.bias.dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_size(tiny_smae, tmp_path):
    model = tiny_smae()
    with torch.no_grad():
        model.encoder.backbone.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan in step 1, from loss_mlm/2x16, loss_mlm/4x32"):
        SmaeTrainer(model=model, args=arguments(tmp_path), train_dataset=TEXTS).train()


def test_wrong_arguments_are_refused(tiny_smae, tmp_path):
    for wrong, message in (
        ({"mlm_probability": 0.0}, "mlm_probability: 0.0 is not allowed; use a number between 0 and 1"),
        ({"mlm_probability": 0.5}, r"mlm_probability: 0.5 is above decoder_mlm_probability \(0.4\)"),
        ({"max_length": 4}, "max_length: 4 is not allowed; use a number of at least 8"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **wrong)
    with pytest.raises(ValueError, match="max_steps: a stream has no length"):
        SmaeTrainer(tiny_smae(), arguments(tmp_path, max_steps=-1), TEXTS.to_iterable_dataset())


def test_fsdp_is_refused(under_fsdp, tiny_smae, tmp_path):
    with pytest.raises(ValueError, match="fsdp: masked-autoencoder pre-training needs unsharded weights; use DDP"):
        SmaeTrainer(tiny_smae(), arguments(tmp_path), TEXTS)


TWO = """
import sys, torch
from datasets import Dataset
from modeling_2dmse import StarbucksForMaskedAutoencoding
from trainer.smae.arguments import SmaeTrainingArguments
from trainer.smae.corpus import endless
from trainer.smae.trainer import SmaeTrainer

start, out, batch, kind = sys.argv[1:]
texts = Dataset.from_dict({"text": open(f"{start}/../texts").read().splitlines()})
model = StarbucksForMaskedAutoencoding.from_pretrained(start)
args = SmaeTrainingArguments(output_dir=out, max_steps=3, per_device_train_batch_size=int(batch), use_cpu=True,
    logging_steps=1, save_strategy="no", disable_tqdm=True, bf16=False, report_to="none", learning_rate=1e-3)
trainer = SmaeTrainer(model, args, endless(texts.to_iterable_dataset(), 0) if kind == "stream" else texts, texts)
metrics = trainer.evaluate()
trainer.train()
trainer.save_model()

def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(parts, tensor)
    return parts

assert torch.equal(*gathered(torch.cat([p.detach().flatten() for p in model.parameters()])))
assert not torch.equal(*gathered(trainer.data_collator([{"text": text} for text in texts["text"]])["labels"]))
if trainer.is_world_process_zero():
    torch.save(metrics, f"{out}/metrics.pt")
trainer.accelerator.end_training()
"""


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_two_processes_train_one_model(kind, tiny_smae, tmp_path):
    """The weights of both processes stay equal, so the gradients are synchronized, and the masks differ."""
    model = tiny_smae()
    model.save_pretrained(tmp_path / "start")
    model.encoder.tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "texts").write_text("\n".join(TEXTS["text"]))
    (tmp_path / "run.py").write_text(TWO + LEAVE)
    run_processes(2, tmp_path / "run.py", str(tmp_path / "start"), str(tmp_path / "two"), "2", kind)
    trained = StarbucksForMaskedAutoencoding.from_pretrained(tmp_path / "two")
    assert not torch.equal(trained.head.bias, model.head.bias)
    alone = SmaeTrainer(model=model, args=arguments(tmp_path / "one"), eval_dataset=TEXTS).evaluate()
    assert set(torch.load(tmp_path / "two" / "metrics.pt")) == set(alone)
