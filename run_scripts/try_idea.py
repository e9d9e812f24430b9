"""Train with ideas that were tried and dropped: `python run_scripts/try_idea.py RECIPE.yaml --idea NAME=NUMBER ...`.

It takes finetune.py's arguments besides and writes the same folder; docs/lab-notes.md says what each idea gave.
"""

import argparse

from run_scripts import finetune
from run_scripts.comparing.ideas import IDEAS, idea_trainer
from run_scripts.shared import cli


def main(argv=None) -> None:
    """Parse the ideas, and leave the rest to finetune.py."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="%(prog)s RECIPE.yaml --idea NAME=NUMBER [NAME=NUMBER ...] [--flag value ...]",
        description="All other flags are finetune.py's.",
        epilog="\n\n".join(f"{name}: {' '.join(idea.__doc__.split())}" for name, idea in IDEAS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--idea", nargs="+", required=True, metavar="NAME=NUMBER", help="What to try, how much of it.")
    args, rest = parser.parse_known_args(argv)
    with cli.user_errors():
        trainer = idea_trainer(dict(map(_parse, args.idea)))
    finetune.main(rest, trainer)


def _parse(idea: str) -> tuple[str, float]:
    name, _, number = idea.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ValueError(f"idea: {idea!r} is not NAME=NUMBER, for example shallow_gradient=0.3") from None


if __name__ == "__main__":
    main()
