"""What the arguments of all trainers share."""

import pytest
import torch

from trainer.arguments import SmaeTrainingArguments, TwoDMSETrainingArguments
from trainer.classification import ClassifierTrainingArguments
from trainer.franca import FrancaTrainingArguments
from trainer.m3 import M3TrainingArguments

KINDS = [
    ClassifierTrainingArguments,
    FrancaTrainingArguments,
    M3TrainingArguments,
    SmaeTrainingArguments,
    TwoDMSETrainingArguments,
]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_uses_one_gpu_of_several(kind, tmp_path):
    """With more, Trainer would cut a step's rows apart, and each part would have a loss of its own."""
    args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.device == torch.device("cpu")
    rows = args.train_batch_size
    for found in (0, 1, 4):
        args._n_gpu = found
        assert args.n_gpu == min(1, found)
        assert args.train_batch_size == rows
