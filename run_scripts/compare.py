"""Compare methods under one budget: `python run_scripts/compare.py run_scripts/recipes/compare-minilm.yaml
--train_file F --eval_file F --sts_files F ...`.

Run again, or in several processes at once, it continues with what is not finished.
"""

import math
from dataclasses import dataclass, field

from retrieval.checking import check_name
from run_scripts.comparing.methods import BEST, METHODS, SAME_RECIPE, SMAE, Budget
from run_scripts.shared import checks, cli


@dataclass
class ComparisonArguments:
    """What is compared, on what, and where the results go."""

    eval_file: str = field(metadata={"help": "Scored sentence pairs that learning rates are chosen on."})
    sts_files: list[str] = field(metadata={"help": "Scored sentence pairs that are reported."})
    beir_dirs: list[str] | None = field(
        default=None, metadata={"help": "Folders in BEIR layout, whose nDCG@10 is reported as well."}
    )
    train: str = field(default="nli", metadata={"help": "Name of the training data in the results."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Names of methods; an unknown one is answered with all of them. Default: all."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Seeds of the runs; learning rates are chosen with the first."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4],
        metadata={"help": "Rates from which each method's is chosen, climbing from the middle."},
    )
    rates_per_method: int = field(
        default=5,
        metadata={"help": "How many of these rates are tried, the same number for every method and separate model."},
    )
    output_dir: str = field(default="out/compare", metadata={"help": "Folder for the models."})
    results_file: str = field(
        default="docs/results/compare-minilm.json",
        metadata={"help": "File of finished runs; the table and the picture are written next to it."},
    )


def main(argv=None) -> None:
    """Parse, check, run what is not finished, report."""
    with cli.user_errors():
        args, budget = cli.Parser((ComparisonArguments, Budget)).parse(argv)
        check(args, budget)

        from run_scripts.comparing.running import Comparison

        comparison = Comparison(args, budget)
    comparison.run()


def check(args: ComparisonArguments, budget: Budget) -> None:
    """ValueError for what would fail after hours."""
    for method in args.methods:
        checks.check_choice("methods", method, METHODS)
    if not args.learning_rates or not all(0 < rate < math.inf for rate in args.learning_rates):
        raise ValueError(f"learning_rates: {args.learning_rates} is not allowed; name numbers above 0")
    checks.check_at_least("rates_per_method", args.rates_per_method, 2)
    checks.check_seeds(args.seeds)
    check_name(args.train, "train")  # it is a part of the names of files
    cli.exactly_one(budget, "train_file", "dataset_name", "the training data")
    checks.check_files("recipe", budget.recipe)
    if SMAE in args.methods:
        check_pretraining(budget)
    if BEST in args.methods or SAME_RECIPE in args.methods:
        checks.check_files("best_recipe", budget.best_recipe)
        flags = cli.recipe_flags(budget.best_recipe)
        if "--model_name_or_path" in flags:  # the folder of an earlier stage, for example
            checks.check_model(flags[flags.index("--model_name_or_path") + 1], "best_recipe: model_name_or_path")
    for name in ("unlabeled_file", "train_file"):
        checks.check_files(name, getattr(budget, name))
    checks.check_files("eval_file", args.eval_file)
    checks.check_files("sts_files", *args.sts_files)
    checks.check_beir_dirs("beir_dirs", args.beir_dirs or [], "test")


def check_pretraining(budget: Budget) -> None:
    """ValueError unless either the recipe of SMAE names a dataset or a file is given."""
    has_dataset = "--dataset_name" in cli.recipe_flags(budget.pretrain_recipe)
    if has_dataset == bool(budget.pretrain_file):
        recipe = budget.pretrain_recipe
        raise ValueError(f"pretrain_file: name plain text for {SMAE} if {recipe} has no dataset, and only then")
    checks.check_files("pretrain_file", budget.pretrain_file or None)


if __name__ == "__main__":
    main()
