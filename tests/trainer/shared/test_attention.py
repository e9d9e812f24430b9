"""The attention that a training in bf16 on a CPU uses."""

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_on_a_cpu_trains_with_matrix_products(bf16, tiny_model, tmp_path):
    used = []

    class Watched(TwoDMSETrainer):
        def compute_loss(self, *args, **kwargs):
            used.append(torch.backends.cuda.flash_sdp_enabled())  # despite its name, the switch of CPUs as well
            return super().compute_loss(*args, **kwargs)

    rows = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})
    args = TwoDMSETrainingArguments(
        str(tmp_path), sizes=LADDER, max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=bf16,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Watched(model=tiny_model(), args=args, train_dataset=rows).train()
    assert used == [not bf16] * 2
    assert torch.backends.cuda.flash_sdp_enabled(), "only while it trains"
