"""How each method trains one model under the shared budget."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import set_seed

from modeling_2dmse import parse_ladder
from run_scripts import finetune, pretrain
from run_scripts.shared import models
from run_scripts.shared import peer as peers

from . import fitting
from .methods import BEST, FLAGS, PEER, PEER_ALL, SAME_RECIPE, SMAE, WITHOUT_TRAINING, Budget, Unit
from .store import claim


def train(unit: Unit, rate: float | None, seed: int, budget: Budget, folder: Path) -> str:
    """
    The folder of a trained model. A finished run is not repeated; a run that was stopped starts again.

    Args:
        rate: learning rate; None for a method without training.
        folder: has the models of this training data; the model that SMAE pre-trains is written next to it.
    """
    target = folder / (f"{unit}-{seed}" if rate is None else f"{unit}-{rate:g}-{seed}")
    if target.is_dir():
        return str(target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if unit.method in WITHOUT_TRAINING:
        fitting.fit(unit.method, budget.recipe, seed, budget, str(partial))
    elif unit.method in (PEER, PEER_ALL):
        _train_peer(rate, seed, budget, str(partial), every=unit.method == PEER_ALL)
    elif unit.method == SAME_RECIPE:
        start = _once(folder / f"start-{seed}", lambda path: fitting.write_start(seed, budget, path))
        fitting.train_same_recipe(unit, rate, seed, budget, str(partial), str(start))
    else:
        pretrained = _pretrained(budget, folder.with_name("smae")) if unit.method == SMAE else None
        _finetune(unit, rate, seed, budget, str(partial), pretrained)
    os.replace(partial, target)
    return str(target)


def _finetune(unit: Unit, rate: float, seed: int, budget: Budget, folder: str, pretrained: str | None) -> None:
    flags = [budget.best_recipe if unit.method == BEST else budget.recipe, *budget.data_flags]
    flags += [*FLAGS.get(unit.method, ()), *fitting.QUIET, *budget.flags]
    flags += ["--learning_rate", str(rate), "--seed", str(seed)]
    if unit.size is not None:
        flags += ["--sizes", unit.size]
    if unit.method == BEST and budget.unlabeled_file is not None:
        flags += ["--unlabeled_file", budget.unlabeled_file]
    if pretrained is not None:
        flags += ["--model_name_or_path", pretrained]
    finetune.main([*flags, "--output_dir", folder])


def _pretrained(budget: Budget, folder: Path) -> str:
    """The encoder that SMAE pre-trains, once for all seeds and training data."""

    def run(partial: str) -> None:
        flags = ["--train_file", budget.pretrain_file] if budget.pretrain_file else []
        flags += [*budget.precision, "--save_strategy", "no", "--disable_tqdm", "true"]
        pretrain.main([budget.pretrain_recipe, *flags, "--report_to", "none", "--output_dir", partial])

    return str(_once(folder, run) / "encoder")


def _once(folder: Path, make: Callable[[str], None]) -> Path:
    """A folder that several runs use, made by the first of them; `make` writes it."""
    with claim(folder.with_name(f"{folder.name}.lock"), wait=True):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(str(partial))
            os.replace(partial, folder)
    return folder


def _train_peer(rate: float, seed: int, budget: Budget, folder: str, every: bool) -> None:
    """
    Train with sentence-transformers' Matryoshka2dLoss and its own trainer.

    Args:
        every: train every layer and dim in each step, instead of the last layer, one other layer and one dim (the
            loss's default).
    """
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    model, args = budget.arguments()
    set_seed(seed)
    peer = peers.load_peer(models.resolve_model(model.model_name_or_path), args.max_length, model.trust_remote_code)
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
    sampling = {"n_layers_per_step": -1, "n_dims_per_step": -1} if every else {}
    loss = losses.Matryoshka2dLoss(peer, inner, dims, **sampling)
    SentenceTransformerTrainer(model=peer, args=arguments, train_dataset=rows, loss=loss).train()
    peer.save(folder)
