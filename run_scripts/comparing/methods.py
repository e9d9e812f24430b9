"""The methods that are compared, and how each of them trains one model under the shared budget."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import set_seed

from modeling_2dmse import Size, parse_ladder
from run_scripts import finetune, pretrain
from run_scripts.shared import cli, models
from run_scripts.shared import peer as peers
from trainer import TwoDMSETrainingArguments
from trainer.data import check_table
from trainer.shared.tables import draw_rows, read_table

from .store import claim

UNTRAINED, SEPARATE, PEER, SMAE, BEST = "untrained", "separate", "sentence-transformers-2d", "smae-starbucks", "best"
# Flags of finetune.py that make a method; they stand behind those of the shared recipe.
FLAGS = {
    SEPARATE: ("--objective", "separate", "--alignment", "none"),
    "matryoshka": ("--objective", "matryoshka", "--alignment", "none"),
    "2dmse": ("--objective", "2dmse", "--alignment", "feature_kl"),
    "starbucks-feature_kl": ("--objective", "starbucks", "--alignment", "feature_kl"),
    "starbucks-score_kl": ("--objective", "starbucks", "--alignment", "score_kl"),
    SMAE: ("--objective", "starbucks", "--alignment", "score_kl"),
}
METHODS = (UNTRAINED, *FLAGS, PEER, BEST)
# A run of the comparison is evaluated afterwards, on all tasks at once.
QUIET = ("--max_eval_samples", "0", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true")
QUIET += ("--report_to", "none")


@dataclass(frozen=True)
class Budget:
    """What all methods have in common.

    Args:
        recipe: of finetune.py: backbone, ladder, loss, batch, epochs, schedule.
        train_file: rows to train on, of which each seed draws `max_train_samples`; or the Hub dataset named by
            dataset_name and dataset_config.
        best_recipe: of finetune.py, for the method `best`.
        pretrain_recipe, pretrain_file: of pretrain.py, for `smae-starbucks`.
        unlabeled_file: texts without labels, for `best`.
        num_train_epochs, loss_scale: of all methods; None for what the recipes say.
        bf16: mixed precision for all; None for what recipes and machine say.
        folder: where models are written; beside it, the one that SMAE has pre-trained.
    """

    recipe: str
    train_file: str | None
    dataset_name: str | None
    dataset_config: str | None
    max_train_samples: int | None
    best_recipe: str
    pretrain_recipe: str
    pretrain_file: str | None
    unlabeled_file: str | None
    num_train_epochs: float | None
    loss_scale: float | None
    bf16: bool | None
    folder: Path

    def arguments(self) -> tuple[finetune.ModelArguments, TwoDMSETrainingArguments]:
        """What the shared recipe says."""
        parser = cli.Parser((finetune.ModelArguments, finetune.DataArguments, TwoDMSETrainingArguments))
        model, _, args = parser.parse([self.recipe, *self.flags, "--output_dir", str(self.folder)])
        return model, args

    @property
    def precision(self) -> list[str]:
        """The flag of finetune.py and pretrain.py."""
        return [] if self.bf16 is None else ["--bf16", str(self.bf16)]

    @property
    def flags(self) -> list[str]:
        """Those of finetune.py that stand in place of what recipes say."""
        epochs = [] if self.num_train_epochs is None else ["--num_train_epochs", str(self.num_train_epochs)]
        scale = [] if self.loss_scale is None else ["--loss_scale", str(self.loss_scale)]
        return [*self.precision, *epochs, *scale]

    def rows(self, seed: int) -> Dataset:
        """The rows that finetune.py draws by a seed."""
        if self.train_file is not None:
            table = check_table(read_table(self.train_file), "train_file")
        else:
            table = load_dataset(self.dataset_name, self.dataset_config, split="train")
            table = check_table(table, "dataset_name")
        return draw_rows(table, self.max_train_samples, seed)


@dataclass(frozen=True)
class Unit:
    """One method, or `separate` at one size: what a learning rate is chosen for."""

    method: str
    size: str | None = None

    def __str__(self) -> str:
        return self.method if self.size is None else f"{self.method}-{self.size}"


def units(methods: list[str], ladder: list[Size]) -> list[Unit]:
    """The methods, `separate` once a size."""
    return [
        unit
        for method in methods
        for unit in ([Unit(method, str(size)) for size in ladder] if method == SEPARATE else [Unit(method)])
    ]


def train(unit: Unit, rate: float, seed: int, budget: Budget) -> str:
    """The folder of a trained model; a run that was stopped half-way begins anew."""
    folder = budget.folder / f"{unit}-{rate:g}-{seed}"
    if folder.is_dir():
        return str(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if unit.method == PEER:
        _train_peer(rate, seed, budget, str(partial))
    else:
        _finetune(unit, rate, seed, budget, str(partial))
    os.replace(partial, folder)
    return str(folder)


def _finetune(unit: Unit, rate: float, seed: int, budget: Budget, folder: str) -> None:
    flags = [budget.best_recipe if unit.method == BEST else budget.recipe]
    for name in ("train_file", "dataset_name", "dataset_config", "max_train_samples"):
        value = getattr(budget, name)
        flags += [] if value is None else [f"--{name}", str(value)]
    flags += [*FLAGS.get(unit.method, ()), *QUIET, *budget.flags, "--learning_rate", str(rate), "--seed", str(seed)]
    if unit.size is not None:
        flags += ["--sizes", unit.size]
    if unit.method == BEST and budget.unlabeled_file is not None:
        flags += ["--unlabeled_file", budget.unlabeled_file]
    if unit.method == SMAE:
        flags += ["--model_name_or_path", _pretrained(budget)]
    finetune.main([*flags, "--output_dir", folder])


def _pretrained(budget: Budget) -> str:
    """The encoder that SMAE pre-trains, once for all seeds and training data."""
    folder = budget.folder.with_name("smae")
    with claim(folder.with_name("smae.lock"), wait=True):
        if not folder.is_dir():
            partial = folder.with_name("smae.partial")
            shutil.rmtree(partial, ignore_errors=True)
            flags = ["--train_file", budget.pretrain_file] if budget.pretrain_file else []
            flags += [*budget.precision, "--save_strategy", "no", "--disable_tqdm", "true"]
            pretrain.main([budget.pretrain_recipe, *flags, "--report_to", "none", "--output_dir", str(partial)])
            os.replace(partial, folder)
    return str(folder / "encoder")


def _train_peer(rate: float, seed: int, budget: Budget, folder: str) -> None:
    """sentence-transformers' Matryoshka2dLoss with its default sampling, by its own trainer."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    model, args = budget.arguments()
    set_seed(seed)
    peer = peers.load_peer(models.resolve_model(model.model_name_or_path), args.max_length)
    rows = budget.rows(seed)
    loss_class = losses.CoSENTLoss if "score" in rows.column_names else losses.MultipleNegativesRankingLoss
    inner = loss_class(peer, scale=args.loss_scale)
    dims = sorted({size.dim for size in parse_ladder(args.sizes)}, reverse=True)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        seed=seed,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    loss = losses.Matryoshka2dLoss(peer, inner, dims)
    SentenceTransformerTrainer(model=peer, args=arguments, train_dataset=rows, loss=loss).train()
    peer.save(folder)
