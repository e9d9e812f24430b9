"""The arguments that all trainers share."""

import pytest
import torch

from modeling_2dmse.configuration_2dmse import SIMILARITIES
from trainer import choices, losses, objectives
from trainer.arguments import TwoDMSETrainingArguments
from trainer.franca.trainer import FrancaTrainingArguments
from trainer.m3.trainer import M3TrainingArguments
from trainer.mrl.trainer import ClassifierTrainingArguments
from trainer.shared import arguments as shared_arguments
from trainer.shared.callbacks import StopSignals
from trainer.shared.part_log import PartLogMixin
from trainer.smae.arguments import SmaeTrainingArguments

KINDS = [
    ClassifierTrainingArguments,
    FrancaTrainingArguments,
    M3TrainingArguments,
    SmaeTrainingArguments,
    TwoDMSETrainingArguments,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs")
def test_fp16_needs_a_gpu(kind, tmp_path):
    with pytest.raises(ValueError, match="fp16: true needs a GPU; a CPU trains in --bf16 true or --bf16 false"):
        kind(output_dir=str(tmp_path), fp16=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_uses_one_gpu_of_several(kind, tmp_path):
    """With more, Trainer would split the rows of a step, and each part would have its own loss."""
    args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.device == torch.device("cpu")
    rows = args.train_batch_size
    for found in (0, 1, 4):
        args._n_gpu = found
        assert args.n_gpu == min(1, found)
        assert args.train_batch_size == rows


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_follows_the_launcher(kind, tmp_path, monkeypatch):
    """`accelerate launch` may configure mixed precision; DeepSpeed refuses arguments that contradict it."""
    for capable in (False, True):
        monkeypatch.setattr("trainer.shared.arguments.cpu_has_bf16", lambda capable=capable: capable)
        for launched, expected in (("bf16", True), ("fp16", False), ("no", capable), (None, capable)):
            if launched is None:
                monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
            else:
                monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
            assert kind(output_dir=str(tmp_path), use_cpu=True).bf16 is expected, (capable, launched)
            assert kind(output_dir=str(tmp_path), use_cpu=True, bf16=False).bf16 is False


class Started:
    """A trainer as far as its mixins see it."""

    def __init__(self, args):
        self.args, self.model, self.stop_signals = args, None, StopSignals()

    def train(self):
        """Nothing."""


def test_bf16_by_default_is_said_once_when_training_starts(tmp_path, monkeypatch):
    """Not when the arguments are made: it would be one more line above an error."""
    said: list[str] = []
    monkeypatch.setattr(shared_arguments.logger, "warning", said.append)
    monkeypatch.setattr(shared_arguments, "cpu_has_bf16", lambda: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    args = TwoDMSETrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.bf16
    assert said == []
    trainer = type("Trained", (PartLogMixin, Started), {})(args)
    trainer.train(), trainer.train()
    assert said == ["bf16 is on: this CPU has instructions for it (turn it off with --bf16 false)"]


def test_the_names_in_the_arguments_are_those_of_the_implementations():
    """They are stated separately, so that arguments can be read without the modeling code."""
    assert tuple(objectives.OBJECTIVES) == choices.OBJECTIVES
    assert choices.SIMILARITIES == SIMILARITIES
    assert tuple(losses.SCORE_LOSSES) == choices.LOSSES[-len(losses.SCORE_LOSSES) :]
    assert set(objectives.DEFAULT_ALIGNMENT) <= set(choices.OBJECTIVES)
    assert set(objectives.DEFAULT_ALIGNMENT.values()) <= set(choices.ALIGNMENTS)
