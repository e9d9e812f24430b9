"""Slice, flat and projection heads on scikit-learn's digits: `python run_scripts/digits_franca.py [--seeds 0 1 2]`."""

import os
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli


@dataclass
class DigitArguments:
    """What is compared."""

    output_dir: str = field(default="out/digits", metadata={"help": "Folder for results.json."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each head is trained with each seed."}
    )
    steps: int = field(default=500, metadata={"help": "Optimizer steps of each training."})
    validation: bool = field(
        default=False, metadata={"help": "Measure on a part of the training part, and leave the test part unused."}
    )


def main(argv=None) -> None:
    """Parse, train, measure, print, write."""
    with cli.user_errors():
        (args,) = cli.Parser((DigitArguments,)).parse(argv)
        checks.check_seeds(args.seeds)
        if args.steps < 1:
            raise ValueError(f"steps: {args.steps} with {len(args.seeds)} seeds is nothing to train; use at least 1")

        from run_scripts.benchmarks.digits import HEADS, load_parts, mean_scores, score_digits, train_digits
        from run_scripts.shared import output

        digits = load_parts(args.validation)
        os.makedirs(args.output_dir, exist_ok=True)
    runs: dict[str, list] = {head: [] for head in HEADS}
    for seed in args.seeds:
        for head in HEADS:
            runs[head].append(score_digits(train_digits(head, seed, digits, args.steps), digits))
            print(f"seed {seed}, {head}: " + "  ".join(f"{m} {score:.4f}" for m, score in runs[head][-1].items()))
    means = {head: mean_scores(scores) for head, scores in runs.items()}
    print(f"\nkNN accuracy, mean over seeds:\n\n{output.score_table(means, list(means['slice']), 'size')}")
    results = {"seeds": args.seeds, "steps": args.steps, "validation": args.validation, "runs": runs, "mean": means}
    with cli.writing(args.output_dir):
        output.write_json(os.path.join(args.output_dir, "results.json"), results)


if __name__ == "__main__":
    main()
