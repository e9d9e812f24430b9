"""Models whose weights accelerate has offloaded: trainers refuse them, projections are fitted or refused."""

import accelerate
import numpy as np
import pytest
import torch
import transformers
from conftest import LADDER, SENTENCES, TRIPLETS
from datasets import Dataset
from tiny_vision import tiny_model as tiny_franca

from modeling_2dmse import TwoDMSEModel, parse_ladder
from modeling_2dmse.modeling_smae import StarbucksForMaskedAutoencoding
from modeling_mrl import MatryoshkaForSequenceClassification
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.franca.trainer import FrancaTrainer
from trainer.guide import Guide
from trainer.m3.trainer import M3Trainer
from trainer.mrl.arguments import ClassifierTrainingArguments
from trainer.mrl.trainer import ClassifierTrainer
from trainer.projections import fit_exit_projections
from trainer.refining import refine_exit_projections
from trainer.shared import mixin
from trainer.smae.trainer import SmaeTrainer

REFUSED = r"model: \d+ of its weights are offloaded or without values \(on the meta device\), for example "
CPU = torch.device("cpu")


def offloaded(model: torch.nn.Module) -> torch.nn.Module:
    accelerate.cpu_offload(model, execution_device=CPU)
    return model


def test_every_trainer_refuses_an_offloaded_model(tiny_model, backbone_path, llava_path, tmp_path, monkeypatch):
    rows = Dataset.from_dict(TRIPLETS)
    args = TwoDMSETrainingArguments(str(tmp_path / "out"), sizes=LADDER, use_cpu=True, report_to="none")
    tiny_model().save_pretrained(tmp_path / "model")
    apart = {"backbone.embeddings": "cpu", "backbone.encoder": "disk"}
    model = TwoDMSEModel.from_pretrained(tmp_path / "model", device_map=apart, offload_folder=str(tmp_path / "off"))
    with pytest.raises(ValueError, match=f"{REFUSED}backbone.encoder.layer.0.*; to train it, load it without"):
        TwoDMSETrainer(model, args, rows)
    with pytest.raises(ValueError, match=REFUSED):
        TwoDMSETrainer(None, args, rows, model_init=lambda: offloaded(tiny_model()))
    frozen = tiny_model().requires_grad_(False)
    frozen.add_exit_projections()
    with pytest.raises(ValueError, match=REFUSED):
        TwoDMSETrainer(offloaded(frozen), args, rows)
    with pytest.raises(ValueError, match=REFUSED):
        SmaeTrainer(offloaded(StarbucksForMaskedAutoencoding.from_backbone(backbone_path("bert"), sizes=LADDER)), None)
    with pytest.raises(ValueError, match=REFUSED):
        M3Trainer(offloaded(transformers.AutoModelForImageTextToText.from_pretrained(llava_path)), None)
    with pytest.raises(ValueError, match=REFUSED):
        FrancaTrainer(offloaded(tiny_franca()), None)
    classifier = MatryoshkaForSequenceClassification.from_backbone(backbone_path("bert"), sizes=[8], num_labels=2)
    with pytest.raises(ValueError, match=REFUSED):
        ClassifierTrainer(offloaded(classifier), ClassifierTrainingArguments(str(tmp_path / "out"), report_to="none"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(mixin, "is_fsdp_enabled", lambda: True)
    mixin.check_at_hand(model)  # it may be a process that waits for the weights of the first one


def test_a_model_that_is_offloaded_after_the_trainer_is_built(tiny_model, tmp_path):
    args = TwoDMSETrainingArguments(str(tmp_path), sizes=LADDER, use_cpu=True, report_to="none")
    trainer = TwoDMSETrainer(tiny_model(), args, Dataset.from_dict(TRIPLETS))
    offloaded(trainer.model)
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()


def test_a_guide_may_be_offloaded(tiny_model, tmp_path):
    args = TwoDMSETrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    batch = dict(tiny_model().tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    batch["lengths"] = batch["attention_mask"].sum(dim=1).tolist()
    expected, found = (Guide(model, args).embeddings(batch) for model in (tiny_model(), offloaded(tiny_model())))
    assert torch.allclose(found, expected, atol=1e-5)


def test_projections_of_an_offloaded_model(tiny_model):
    expected, model = tiny_model(), offloaded(tiny_model())
    targets, ladder = torch.randn(len(SENTENCES), 8, generator=torch.manual_seed(0)), parse_ladder(LADDER, 4, 32)
    for encoder in (expected, model):
        fit_exit_projections(encoder, SENTENCES)
        refine_exit_projections(encoder, SENTENCES, targets, ladder, steps=2)
    for n in (1, 4):
        np.testing.assert_allclose(model.encode(SENTENCES, n), expected.encode(SENTENCES, n), atol=1e-4)
    model = offloaded(tiny_model(projected=True))
    before = model.encode(SENTENCES, 1)
    with pytest.raises(ValueError, match=r"encoder: its exit projections are offloaded .*; fit them before offloading"):
        fit_exit_projections(model, SENTENCES)
    with pytest.raises(ValueError, match=r"encoder: its exit projections are offloaded .*; fit them before offloading"):
        refine_exit_projections(model, SENTENCES, targets, ladder)
    assert (model.encode(SENTENCES, 1) == before).all()
