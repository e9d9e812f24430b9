"""Training: samples per second of whole steps, data loading and optimizer included, against sentence-transformers."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from modeling_2dmse import parse_ladder
from run_scripts.shared import models
from run_scripts.shared import peer as peers
from run_scripts.shared.measure import in_turn, row, seconds, wait, write_profile
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.data import draw_texts, text_columns
from trainer.shared.arguments import cpu_has_bf16

BATCH, WARM_UP, STEPS = 64, 2, 8
# What recipes/minilm-best.yaml adds to `starbucks`.
PROJECTIONS = {"exit_projections": True}
RECIPE = PROJECTIONS | {"teacher": "start", "alignment_weight": 3.0}
# Neither side evaluates, saves or logs during the measurement.
QUIET = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def train_cost(args, rows: Dataset) -> list[dict]:
    """Ratios of samples per second: float32, bf16, defaults; and what our recipe and the ladder add to a step.

    Args:
        args: the benchmark's arguments.
        rows: a checked table of texts without scores.
    """
    peers.check_installed()
    columns = text_columns(rows)
    head = rows.select(range(BATCH))[:]
    model, peer = peers.load_both(args)
    peers.check_same_embeddings(model, peer, head[columns[0]], parse_ladder(args.sizes))
    peers.check_same_loss(model, peer, {column: head[column] for column in columns})
    if args.profile:
        trainer = ours(args, rows, TrainerCallback(), bf16=False)
        write_profile(trainer.train, Path(args.output_dir) / "profile-train.txt")
    own, other = partial(rate, ours, args, rows), partial(rate, theirs, args, rows)
    sides = {
        "ours": partial(own, bf16=False),
        "theirs": partial(other, bf16=False, whole=True),
        "theirs-sampled": partial(other, bf16=False, whole=False),
        "ours-default": own,
        "theirs-default": partial(other, bf16=False, whole=False, batch=8),
        "ours-projections": partial(own, bf16=False, **PROJECTIONS),
        "ours-recipe": partial(own, bf16=False, **RECIPE),
        "ours-unlabeled": partial(own, bf16=False, unlabeled=True, **RECIPE),
    }
    if cpu_has_bf16() or model.device.type != "cpu":
        sides |= {"ours-bf16": partial(own, bf16=True), "theirs-bf16": partial(other, bf16=True, whole=True)}
    rates = in_turn(args.runs, sides)
    more = {"batch": BATCH, "steps": STEPS, "unit": "samples per second"}
    lines = [
        row("train.fp32", ">= 1.5", rates["ours"], rates["theirs"], **more),
        row("train.fp32_sampled", "none", rates["ours"], rates["theirs-sampled"], **more),
        row("train.default", ">= 3", rates["ours-default"], rates["theirs-default"], **more | {"batch": [BATCH, 8]}),
        row("train.projections_cost", "none", rates["ours"], rates["ours-projections"], batch=BATCH, steps=STEPS),
        row("train.recipe_cost", "none", rates["ours"], rates["ours-recipe"], batch=BATCH, steps=STEPS),
        row("train.unlabeled_cost", "none", rates["ours"], rates["ours-unlabeled"], batch=BATCH, steps=STEPS),
        ladder_cost(args, rows),
    ]
    if "ours-bf16" in rates:
        lines.insert(1, row("train.bf16", ">= 1.7", rates["ours-bf16"], rates["theirs-bf16"], **more))
    else:
        print("train.bf16 is left out: this CPU does not have bf16 instructions", flush=True)
    return lines


def ladder_cost(args, rows: Dataset) -> dict:
    """Time of forward and backward with the whole ladder over that with only its largest size, in turn after each step.

    Single steps are compared because the difference is smaller than the drift of the machine's speed during a run.
    """
    sides = {"ladder": {}, "one size": {"objective": "separate", "sizes": args.sizes[-1:]}}
    trainers = {name: ours(args, rows, TrainerCallback(), bf16=False, **more) for name, more in sides.items()}
    batches = list(trainers["ladder"].get_train_dataloader())
    count = dict.fromkeys(sides, 0)

    def step(name: str) -> float:
        trainer, batch = trainers[name], batches[count[name] % len(batches)]
        count[name] += 1
        trainer.current_gradient_accumulation_steps = 1
        taken = seconds(lambda: trainer.training_step(trainer.model, dict(batch)))
        trainer.model.zero_grad()
        return taken

    in_turn(1, {name: partial(step, name) for name in sides})  # allocates memory and starts threads
    taken = in_turn(4 * args.runs, {name: partial(step, name) for name in sides})
    return row("train.ladder_cost", "<= 1.08", taken["ladder"], taken["one size"], batch=BATCH)


class Clock(TrainerCallback):
    """Measures the seconds from the end of the warm-up's last step to the end of the run's last step."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.marks.append(time.perf_counter())

    @property
    def elapsed(self) -> float:
        return self.marks[-1] - self.marks[WARM_UP - 1]


def rate(side: Callable, *args, batch: int = BATCH, **options) -> float:
    """Samples per second of one run."""
    clock = Clock()
    side(*args, clock, batch=batch, **options).train()
    return STEPS * batch / clock.elapsed


def ours(
    args, rows: Dataset, clock: TrainerCallback, batch: int = BATCH, sizes=None, unlabeled: bool = False, **options
) -> Trainer:
    rows = _part(rows, batch)
    model = models.load_encoder(args.model_name_or_path, sizes or args.sizes, trust_remote_code=args.trust_remote_code)
    arguments = TwoDMSETrainingArguments(
        **_shared(batch), sizes=sizes or args.sizes, max_length=args.max_length, **options
    )
    texts = draw_texts([rows], seed=0, limit=len(rows) * len(text_columns(rows))) if unlabeled else None
    return TwoDMSETrainer(model=model, args=arguments, train_dataset=rows, unlabeled_texts=texts, callbacks=[clock])


def theirs(
    args, rows: Dataset, clock: TrainerCallback, whole: bool | None, batch: int = BATCH, bf16: bool = False
) -> Trainer:
    """Matryoshka2dLoss on every layer and dim of the ladder (`whole`), or by its default on one of each per step; the
    inner loss alone, at the full size, for None."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MultipleNegativesRankingLoss

    peer = peers.load_peer(models.resolve_model(args.model_name_or_path), args.max_length, args.trust_remote_code)
    each = {"n_layers_per_step": -1, "n_dims_per_step": -1} if whole else {}
    dims = sorted({size.dim for size in parse_ladder(args.sizes)}, reverse=True)
    loss = MultipleNegativesRankingLoss(peer)
    if whole is not None:
        loss = Matryoshka2dLoss(peer, loss, dims, **each)
    # Without a GPU, transformers refuses bf16 unless use_cpu is set.
    on_cpu = bf16 and not torch.accelerator.is_available()
    arguments = SentenceTransformerTrainingArguments(**_shared(batch), bf16=bf16, use_cpu=on_cpu)
    return SentenceTransformerTrainer(
        model=peer, args=arguments, train_dataset=_part(rows, batch), loss=loss, callbacks=[clock]
    )


def _shared(batch: int) -> dict:
    steps = WARM_UP + STEPS
    return QUIET | {"output_dir": tempfile.gettempdir(), "max_steps": steps, "per_device_train_batch_size": batch}


def _part(rows: Dataset, batch: int) -> Dataset:
    return rows.select(range(min(len(rows), (WARM_UP + STEPS) * batch)))
