"""Compare methods under one budget: `python run_scripts/compare.py recipes/compare-minilm.yaml --train_file F ...`.

Run again, or in several processes at once, it goes on with what is not finished.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_2dmse import Size, parse_ladder
from run_scripts.comparing.methods import BEST, METHODS, PEER, SMAE, UNTRAINED, Budget, Unit, train, units
from run_scripts.comparing.rates import choose_rate
from run_scripts.comparing.report import draw, means, table
from run_scripts.comparing.store import Store, claim
from run_scripts.shared import cli, models
from trainer.evaluation import StsData, evaluate_tasks, load_sts


@dataclass
class ComparisonArguments:
    """What is compared on what."""

    eval_file: str = field(metadata={"help": "Scored sentence pairs that learning rates are chosen on."})
    sts_files: list[str] = field(metadata={"help": "Scored sentence pairs that are reported."})
    train_file: str | None = field(
        default=None, metadata={"help": "Rows (anchor, positive[, negative]) or (sentence1, sentence2, score)."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset with such columns instead."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration; the split is `train`."})
    train: str = field(default="nli", metadata={"help": "Name of the training data in the results."})
    recipe: str = field(
        default=str(cli.RECIPES / "minilm-nli.yaml"),
        metadata={"help": "Recipe of finetune.py that all methods share: backbone, ladder, batch, epochs, schedule."},
    )
    best_recipe: str = field(
        default=str(cli.RECIPES / "minilm-best.yaml"), metadata={"help": "Recipe of finetune.py for `best`."}
    )
    pretrain_recipe: str = field(
        default=str(cli.RECIPES / "smae-quick.yaml"), metadata={"help": "Recipe of pretrain.py for SMAE."}
    )
    pretrain_file: str | None = field(
        default=None, metadata={"help": "Plain text for SMAE, where its recipe names no dataset."}
    )
    unlabeled_file: str | None = field(
        default=None, metadata={"help": "Texts without labels for `best`, as finetune.py takes them."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Which: {', '.join(METHODS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first also chooses the rate."})
    learning_rates: list[float] = field(
        default_factory=lambda: [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4],
        metadata={"help": "From which each method's is chosen, climbing from the middle."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Rows of a run, drawn by its seed."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of every method. Default: as the recipes say."}
    )
    loss_scale: float | None = field(
        default=None, metadata={"help": "Scale of every method's loss. Default: as the recipes say."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 mixed precision for all methods. Default: as the recipes and machine say."},
    )
    output_dir: str = field(default="out/compare", metadata={"help": "Folder for the models."})
    results_file: str = field(
        default="docs/results/compare-minilm.json", metadata={"help": "Finished runs; table and picture stand beside."}
    )


def main(argv=None) -> None:
    """Parse, check, run what is not finished, report."""
    with cli.user_errors():
        (args,) = cli.Parser((ComparisonArguments,)).parse(argv)
        budget, ladder = _check(args)
        tasks = [load_sts(path) for path in [args.eval_file, *args.sts_files]]
        folder = Path(args.output_dir)
        store = Store(args.results_file, folder / "results.lock", args.train, _settings(args, budget, tasks))
    waiting = []
    for unit in units(args.methods, ladder):
        with claim(folder / f"{args.train}-{unit}.lock") as ours:
            if ours:
                run_unit(unit, args, budget, tasks, store)
            else:
                waiting.append(str(unit))
    if waiting:
        print(f"\nleft to another process: {', '.join(waiting)}")
    report(store, args, ladder, [task.name for task in tasks[1:]])


def run_unit(unit: Unit, args: ComparisonArguments, budget: Budget, tasks: list[StsData], store: Store) -> None:
    """Choose a learning rate and run every seed, as far as that is not done."""
    key = {"method": unit.method} | ({"size": unit.size} if unit.size else {})
    if unit.method == UNTRAINED:
        if not store.find("rows", **key, seed=args.seeds[0]):
            name = budget.arguments()[0].model_name_or_path
            store.add(
                "rows", key | {"seed": args.seeds[0], "learning_rate": None, **_evaluate(name, unit, budget, tasks)}
            )
        return

    def on_dev(rate: float) -> float:
        run = {**key, "learning_rate": rate, "seed": args.seeds[0]}
        row = store.find("search", **run)
        if row is None:
            start = time.perf_counter()
            model = train(unit, rate, args.seeds[0], budget)
            seconds = round(time.perf_counter() - start)
            row = run | _evaluate(model, unit, budget, tasks[:1]) | {"seconds": seconds}
            store.add("search", row)
        scores = row["scores"][tasks[0].name]
        return sum(scores.values()) / len(scores)

    rate = choose_rate(sorted(args.learning_rates), on_dev)
    for seed in args.seeds:
        run = {**key, "learning_rate": rate, "seed": seed}
        if store.find("rows", **run) is None:
            store.add("rows", run | _evaluate(train(unit, rate, seed, budget), unit, budget, tasks))


def report(store: Store, args: ComparisonArguments, ladder: list[Size], tasks: list[str]) -> None:
    """Print the table, and write it and the picture beside the results."""
    scores = means(store.rows(), args.train, tasks)
    if not scores:
        return
    text = f"Trained on {args.train}; Spearman x 100, mean over {', '.join(tasks)}\n\n{table(scores, ladder)}\n"
    print(f"\n{text}")
    start = f"{os.path.splitext(args.results_file)[0]}-{args.train}"
    Path(f"{start}.md").write_text(text, encoding="utf-8")
    draw(scores, ladder, f"{start}.png")


def _evaluate(model: str, unit: Unit, budget: Budget, tasks: list[StsData]) -> dict:
    """{"scores": {task: {size: Spearman}}} of a model folder."""
    _, args = budget.arguments()
    sizes = [unit.size] if unit.size else args.sizes
    encoder = models.to_device(models.load_encoder(model, sizes))
    options = {"max_length": args.max_length, "show_progress_bar": False}
    results = evaluate_tasks(encoder, tasks, parse_ladder(sizes), **options)["sts"]
    scores = {task.name: results[task.name]["spearman"] for task in tasks}
    mean = {name: sum(values.values()) / len(values) for name, values in scores.items()}
    print(f"{unit} {os.path.basename(model)}: " + ", ".join(f"{n} {m:.4f}" for n, m in mean.items()), flush=True)
    device = torch.cuda.get_device_name() if encoder.device.type == "cuda" else encoder.device.type
    return {"scores": scores, "threads": torch.get_num_threads(), "device": device}


def _check(args: ComparisonArguments) -> tuple[Budget, list[Size]]:
    """The budget and its ladder; ValueError for what would fail after hours."""
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods: {unknown[0]!r} is unknown; choose of {', '.join(METHODS)}")
    if not args.learning_rates or min(args.learning_rates) <= 0:
        raise ValueError(f"learning_rates: {args.learning_rates} is not allowed; name numbers above 0")
    if not args.seeds:
        raise ValueError("seeds: name at least one")
    if (args.train_file is None) == (args.dataset_name is None):
        raise ValueError("train_file: name the training data with either --train_file or --dataset_name")
    if SMAE in args.methods:
        _check_pretraining(args)
    if BEST in args.methods and not os.path.isfile(args.best_recipe):
        raise ValueError(f"best_recipe: {args.best_recipe} is not a file")
    if args.unlabeled_file is not None and not os.path.isfile(args.unlabeled_file):
        raise ValueError(f"unlabeled_file: {args.unlabeled_file} is not a file")
    if PEER in args.methods:
        from run_scripts.shared.peer import check_installed

        check_installed()
    budget = Budget(
        recipe=args.recipe,
        train_file=args.train_file,
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        max_train_samples=args.max_train_samples,
        best_recipe=args.best_recipe,
        pretrain_recipe=args.pretrain_recipe,
        pretrain_file=args.pretrain_file,
        unlabeled_file=args.unlabeled_file,
        num_train_epochs=args.num_train_epochs,
        loss_scale=args.loss_scale,
        bf16=args.bf16,
        folder=Path(args.output_dir) / args.train,
    )
    budget.rows(args.seeds[0])
    sizes = budget.arguments()[1].sizes
    if sizes is None:
        raise ValueError(f"recipe: {args.recipe} names no sizes")
    return budget, parse_ladder(sizes)


def _check_pretraining(args: ComparisonArguments) -> None:
    has_dataset = "--dataset_name" in cli.recipe_flags(args.pretrain_recipe)
    if has_dataset == bool(args.pretrain_file):
        raise ValueError(f"pretrain_file: name plain text for {SMAE}, where {args.pretrain_recipe} names no dataset")
    if args.pretrain_file and not os.path.isfile(args.pretrain_file):
        raise ValueError(f"pretrain_file: {args.pretrain_file} is not a file")


def _settings(args: ComparisonArguments, budget: Budget, tasks: list[StsData]) -> dict:
    """What runs must share to be compared."""
    model, training = budget.arguments()
    return {
        "model": model.model_name_or_path,
        "rows": len(budget.rows(args.seeds[0])),
        "sizes": training.sizes,
        "batch": training.per_device_train_batch_size,
        "epochs": training.num_train_epochs,
        "max_length": training.max_length,
        "loss_scale": training.loss_scale,
        "bf16": training.bf16,
        "best_recipe": os.path.basename(args.best_recipe),
        "unlabeled_file": args.unlabeled_file and os.path.basename(args.unlabeled_file),
        "chosen_on": tasks[0].name,
        "tasks": [task.name for task in tasks[1:]],
    }


if __name__ == "__main__":
    main()
