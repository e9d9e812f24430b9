"""Memory and time of the gradient cache, and memory of the loss."""

import tempfile

import torch
from datasets import Dataset

from modeling_2dmse import Size
from run_scripts.shared import models
from run_scripts.shared.measure import allocated_at_peak, in_a_fresh_process, in_turn, peak_memory, row, seconds
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.losses import Rows
from trainer.objectives import Objective
from trainer.step_loss import plan_loss

EXAMPLES, CHUNK, LENGTH = 2048, 64, 32
QUERIES, DOCUMENTS, DIM = 128, 1024, 768


def memory_cost(name_or_path: str, sizes: list[str], runs: int, trust_remote_code: bool = False) -> list[dict]:
    """Peak memory and time of a cached step on 2,048 triplets, and peak memory of the loss without a model."""
    model = name_or_path, sizes, trust_remote_code
    # First here, where a model that cannot be loaded is an error in one line.
    cached, plain = (make_step(side, *model) for side in ("cached", "plain"))
    peaks = {side: in_a_fresh_process(_measure_peak, side, *model) for side in ("cached", "plain")}
    print(f"peak: cached {peaks['cached']:.2f} GB, plain {peaks['plain']:.2f} GB", flush=True)
    plain(0)  # the first step allocates memory and starts threads
    sides = {
        "cached": lambda: seconds(lambda: cached(0)),
        "plain": lambda: seconds(lambda: [plain(i) for i in range(EXAMPLES // CHUNK)]),
    }
    taken = in_turn(runs, sides)
    shape = {"examples": EXAMPLES, "chunk": CHUNK, "length": LENGTH}
    unit = QUERIES * DOCUMENTS * 6 * 4
    return [
        row("memory.gradient_cache", "<= 1.6", [peaks["cached"]], [peaks["plain"]], peaks_gb=peaks, **shape),
        row("memory.gradient_cache_time", "<= 1.7", taken["cached"], taken["plain"], **shape),
        row("memory.loss", "<= 6", [loss_memory()], [unit], unit_bytes=unit),
    ]


def make_step(side: str, name_or_path: str, sizes: list[str], trust_remote_code: bool = False):
    """A function of the batch's number that runs forward and backward of 2,048 triplets in chunks, or of 64 at once.

    Args:
        side: `cached` or `plain`.
    """
    model = models.load_encoder(name_or_path, sizes, trust_remote_code=trust_remote_code)
    texts = {name: ["some words"] * CHUNK for name in ("anchor", "positive", "negative")}
    args = TwoDMSETrainingArguments(
        output_dir=tempfile.gettempdir(),
        sizes=sizes,
        gradient_cache_chunk_size=CHUNK if side == "cached" else None,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        bf16=False,
    )
    trainer = TwoDMSETrainer(model=model, args=args, train_dataset=Dataset.from_dict(texts))
    trainer.current_gradient_accumulation_steps = 1
    examples = EXAMPLES if side == "cached" else CHUNK
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30_000, (3 * EXAMPLES, LENGTH), generator=generator)

    def step(number: int) -> None:
        rows = ids[3 * examples * number : 3 * examples * (number + 1)]
        inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "counts": (examples,) * 3}
        trainer.training_step(model, inputs)
        model.zero_grad()

    return step


def loss_memory() -> int:
    """Peak bytes of `starbucks` with score_kl, forward and backward, without the gradient of the states."""
    ladder = [Size(n, d) for n, d in zip(range(2, 13, 2), (32, 64, 128, 256, 512, 768), strict=True)]
    plan = Objective("starbucks", ladder, 12, DIM, alignment="score_kl").plan(None)
    torch.manual_seed(0)
    states = torch.randn(len(ladder), QUERIES + DOCUMENTS, DIM, requires_grad=True)
    rows = Rows((QUERIES,) * (1 + DOCUMENTS // QUERIES))
    return allocated_at_peak(lambda: plan_loss(plan, states, rows, "infonce")[0].backward()) - states.nbytes


def _measure_peak(side: str, name_or_path: str, sizes: list[str], trust_remote_code: bool, pipe) -> None:
    step = make_step(side, name_or_path, sizes, trust_remote_code)
    for _ in range(1 if side == "cached" else 2):
        step(0)
    pipe.send(peak_memory())
