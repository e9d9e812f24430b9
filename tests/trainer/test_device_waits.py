"""`step.syncs`: no trainer waits for a GPU in a step, forward and backward; and what avoids it changes no loss."""

import functools

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset
from tiny_vision import draw_picture
from tiny_vision import tiny_model as tiny_franca
from transformers import AutoTokenizer

from modeling_2dmse import StarbucksForMaskedAutoencoding
from modeling_mrl import MatryoshkaForSequenceClassification
from run_scripts.shared.waits import counted_waits
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, preparation
from trainer.franca.trainer import FrancaTrainer, FrancaTrainingArguments
from trainer.m3.conversations import check_conversations
from trainer.m3.trainer import M3Trainer, M3TrainingArguments
from trainer.mrl.arguments import ClassifierTrainingArguments
from trainer.mrl.data import TextCollator
from trainer.mrl.trainer import ClassifierTrainer
from trainer.shared import attention, part_log
from trainer.smae.arguments import SmaeTrainingArguments
from trainer.smae.corpus import pack
from trainer.smae.trainer import SmaeTrainer

TEXTS = [" ".join([text] * (1 + number % 3)) for number, text in enumerate(SENTENCES)]
QUIET = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "seed": 0,
}


@pytest.fixture
def make(backbone_path, tiny_model, tiny_m3, llava_processor, tmp_path):
    """A function from a name to a trainer, on rows of different lengths unless it says otherwise."""

    def trainer(kind, arguments, model, rows, **more):
        torch.manual_seed(0)
        return kind(model=model(), args=arguments(output_dir=str(tmp_path), **QUIET), train_dataset=rows, **more)

    def text():
        pairs = Dataset.from_dict({"anchor": TEXTS[::2], "positive": TEXTS[1::2]})
        return trainer(TwoDMSETrainer, TwoDMSETrainingArguments, tiny_model, pairs)

    def smae(family="bert", packed=False):
        folder, rows = backbone_path(family), Dataset.from_dict({"text": TEXTS})
        model = lambda: StarbucksForMaskedAutoencoding.from_backbone(folder, sizes=LADDER)
        if packed:
            rows = pack(rows, AutoTokenizer.from_pretrained(folder), 16)
        return trainer(SmaeTrainer, functools.partial(SmaeTrainingArguments, max_length=16), model, rows)

    def classify(family="bert"):
        folder = backbone_path(family)
        rows = Dataset.from_dict({"text": TEXTS, "label": [i % 2 for i in range(len(TEXTS))]})
        arguments = functools.partial(ClassifierTrainingArguments, remove_unused_columns=False)
        model = lambda: MatryoshkaForSequenceClassification.from_backbone(folder, sizes=LADDER, num_labels=2)
        collator = TextCollator(AutoTokenizer.from_pretrained(folder), ["text"], 32)
        return trainer(ClassifierTrainer, arguments, model, rows, data_collator=collator)

    def m3(padded=True):
        answer = {"role": "assistant", "content": "two"}
        asked = [
            ["<image>which ?", "<image>which digit is this ?", "digit ?"][row % 3 if padded else 1] for row in range(8)
        ]
        turns = [[{"role": "user", "content": text}, answer] for text in asked]
        images = [[draw_picture(0, row, 8)] * text.count("<image>") for row, text in enumerate(asked)]
        rows = check_conversations(Dataset.from_dict({"images": images, "messages": turns}))
        return trainer(M3Trainer, M3TrainingArguments, tiny_m3, rows, processing_class=llava_processor)

    def franca(family="dinov2"):
        rows = Dataset.from_dict({"image": [draw_picture(i % 2, i) for i in range(12)], "index": list(range(12))})
        crops = {"local_crops_number": 2, "global_crop_size": 16, "local_crop_size": 8}
        return trainer(
            FrancaTrainer, functools.partial(FrancaTrainingArguments, **crops), lambda: tiny_franca(family), rows
        )

    makers = {
        "text": text,
        "smae": smae,
        "smae modernbert": functools.partial(smae, "modernbert"),
        "smae blocks": functools.partial(smae, packed=True),
        "classify": classify,
        "classify qwen3": functools.partial(classify, "qwen3"),
        "m3": m3,
        "m3 not padded": functools.partial(m3, padded=False),
        "franca": franca,
        "franca dinov3": functools.partial(franca, "dinov3_vit"),
    }
    return lambda name: makers[name]()


MASKED = ["smae", "smae modernbert", "smae blocks", "classify", "classify qwen3", "m3", "m3 not padded"]


@pytest.mark.parametrize("kind", ["text", *MASKED, "franca", "franca dinov3"])
def test_a_step_waits_for_nothing(kind, make, monkeypatch):
    # As on a GPU: packed rows, masks that are not looked at, and losses whose copies arrive when they are logged.
    monkeypatch.setattr(preparation, "runs_packed", lambda encoder, args: encoder.packs)
    monkeypatch.setattr(attention, "leaves_masks_unread", lambda device: True)
    monkeypatch.setattr(part_log, "copy_to_host", lambda values: (values.clone(), lambda wait: wait))
    trainer = make(kind)
    step, waits = trainer.training_step, []

    def watched(*args, **kwargs):
        with counted_waits() as found:
            loss = step(*args, **kwargs)
        waits.append(found)
        return loss

    monkeypatch.setattr(trainer, "training_step", watched)
    trainer.train()
    assert len(waits) == 2
    assert not any(waits), "\n".join(waits[0])


@pytest.mark.parametrize("kind", MASKED[1:])
def test_masks_that_are_not_looked_at_give_the_same_losses(kind, make, monkeypatch):
    losses = []
    for unread in (False, True):
        monkeypatch.setattr(attention, "leaves_masks_unread", lambda device, unread=unread: unread)
        trainer = make(kind)
        torch.manual_seed(1)  # the same dropout
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert attention._backbones(trainer.model)
        assert all(part.config._attn_implementation != attention.UNREAD for part in attention._backbones(trainer.model))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert len(set(losses[0])) == 2


def test_operations_that_wait_are_counted():
    values, mask = torch.arange(6.0, requires_grad=True), torch.tensor([True, False] * 3)
    waiting = {
        "_local_scalar_dense": lambda: bool(mask.all()),
        "index": lambda: values[mask],
        "nonzero": lambda: mask.nonzero(),
        "masked_select": lambda: values.masked_select(mask),
        "repeat_interleave": lambda: values.repeat_interleave(mask.long()),
        "tolist": lambda: values.tolist(),
        "cpu": lambda: values.cpu(),
        "masked_scatter_backward": lambda: torch.zeros(6).masked_scatter(mask, values[:3]).sum().backward(),
    }
    for name, call in waiting.items():
        with counted_waits() as found:
            call()
        assert [name] == [line.partition(":")[0].removeprefix("aten.") for line in found]
    with counted_waits() as found:
        values.detach()[mask] = 0.0
        values.flatten()[torch.tensor([1, 2])].sum().backward()
        torch.zeros(6).index_copy(0, torch.tensor([1]), values[:1]).masked_fill(mask, 1.0).sum().backward()
    assert not found
