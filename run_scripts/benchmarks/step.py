"""What a training step launches, and how often it waits for the device: counted, so that no GPU is needed."""

import random
import tempfile

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile

from modeling_2dmse import parse_ladder
from run_scripts.benchmarks.train import QUIET
from run_scripts.shared import models
from run_scripts.shared.measure import row
from run_scripts.shared.waits import counted_waits
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.data import PairCollator, text_columns
from trainer.losses import Rows
from trainer.objectives import Objective
from trainer.step_loss import plan_gradient

TRIPLETS, STEPS = 8, 3
# Operators that only change the shape launch nothing.
_VIEWS = ("view", "t", "transpose", "expand", "slice", "as_strided", "unbind", "select", "detach", "diagonal")


def step_cost(args, rows: Dataset) -> list[dict]:
    """`step.launches`, operators of loss and alignment of all sizes over those of the middle one; and `step.syncs`,
    waits for the device in each of some training steps on packed rows, which is how a GPU runs them.

    Args:
        args: the benchmark's arguments.
        rows: what is trained on.
    """
    whole, one = _launches(args.sizes, all_sizes=True), _launches(args.sizes, all_sizes=False)
    waits = _waits(args, rows)
    for line in dict.fromkeys(line for found in waits for line in found):
        print(f"a step waits: {line}", flush=True)
    return [
        row("step.launches", "<= 1.5", [float(whole)], [float(one)], sizes=len(args.sizes)),
        row("step.syncs", "<= 0", [float(len(found)) for found in waits], [1.0] * STEPS, steps=STEPS),
    ]


def _launches(sizes: list[str], all_sizes: bool) -> int:
    """Operators of loss and alignment, forward and backward, on random states of triplets."""
    ladder = parse_ladder(sizes)
    layers, width = max(size.num_layers for size in ladder), max(size.dim for size in ladder)
    plan = Objective("starbucks", ladder, layers, width, teacher="start").plan(random.Random(0))
    if not all_sizes:
        middle = slice(len(plan.terms) // 2, len(plan.terms) // 2 + 1)
        plan = plan._replace(terms=plan.terms[middle], alignments=plan.alignments[middle])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(plan.layers), 3 * TRIPLETS, width, generator=generator)
    start = torch.randn(3 * TRIPLETS, width, generator=generator)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        plan_gradient(plan, states, Rows((TRIPLETS,) * 3), "infonce", start=start)
    names = [event.name.removeprefix("aten::") for event in profiler.events() if event.name.startswith("aten::")]
    return sum(name not in _VIEWS for name in names)


class _Counting(TwoDMSETrainer):
    """Counts the waits of each step. The copy of its loss to the host, which is not waited for, is left out."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waits: list[list[str]] = []

    def record(self, loss, parts) -> None:
        pass

    def training_step(self, *args, **kwargs):
        with counted_waits() as found:
            loss = super().training_step(*args, **kwargs)
        self.waits.append(found)
        return loss


def _waits(args, rows: Dataset) -> list[list[str]]:
    """What each step waits for."""
    rows = rows.select(range(min(len(rows), STEPS * TRIPLETS)))
    model = models.load_encoder(args.model_name_or_path, args.sizes, trust_remote_code=args.trust_remote_code)
    # Found out once, before the first step; a model that does not pack trains on padded rows.
    collator = PairCollator(model.tokenizer, text_columns(rows), args.max_length, packed=model.packs)
    with tempfile.TemporaryDirectory() as folder:
        quiet = QUIET | {"output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": TRIPLETS}
        arguments = TwoDMSETrainingArguments(**quiet, sizes=args.sizes, max_length=args.max_length, bf16=False)
        trainer = _Counting(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
    return trainer.waits
