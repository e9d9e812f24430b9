"""Train with prototypes of ideas: `python run_scripts/try_idea.py RECIPE.yaml --idea NAME=NUMBER ...`.

It also takes finetune.py's arguments and writes the same folder; docs/lab-notes.md reports the effect of those
that were tried.
"""

import argparse
import math

from run_scripts.shared import checks, cli

# Name: what the number changes. The trainers are in comparing/ideas.py.
IDEAS = {
    "own_alignment": "the weight with which the largest size learns from the start (`--teacher start`), apart from the "
    "weight of the other sizes",
    "largest_loss": "the weight of the base loss at the largest size; it stays 1 at the others",
    "drawn_sizes": "the number of further sizes per step, of any layer and of 32, 64, ... H dims, that are trained in "
    "the same way as the ladder's",
    "shallow_gradient": "a factor on the gradient that shallower exits send into the layers they share; their "
    "projections get all of it",
    "layerwise_rates": "a factor from the learning rate of each layer to that of the next one above; embeddings learn "
    "at the rate of the first layer",
    "angle_beside": "the weight of AnglE's loss, added to CoSENT",
    "weakened_directions": "shallow exits are fitted to targets whose directions are divided by their variance to this "
    "power",
    "final_phase": "the share of the steps, at the end, in which only the exits' projections are trained",
    "chain": "the share of the weight of score_kl with which each size learns the similarities of the next larger "
    "size, instead of the teacher's",
    "bank": "the number of vectors of earlier steps that score_kl compares each row with as well",
    "balanced_gradients": "the power of a factor, mean norm over its norm, on the gradient of each exit; 1 makes the "
    "norms equal",
}


def main(argv=None) -> None:
    """Parse the ideas, and leave the other flags to finetune.py."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="%(prog)s RECIPE.yaml --idea NAME=NUMBER [NAME=NUMBER ...] [--flag value ...]",
        description="All other flags are those of finetune.py.",
        epilog="\n\n".join(f"{name}: {effect}" for name, effect in IDEAS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = cli.fail
    parser.add_argument("--idea", nargs="+", required=True, metavar="NAME=NUMBER", help="What to try, and its number.")
    args, rest = parser.parse_known_args(argv)
    with cli.user_errors():
        strengths = dict(map(_parse, args.idea))
        for name in strengths:
            checks.check_choice("idea", name, tuple(IDEAS))
        if rest and not rest[0].startswith("-"):
            checks.check_files("recipe", rest[0])

    from run_scripts import finetune

    def make_trainer(*args, **kwargs):
        from run_scripts.comparing.ideas import idea_trainer  # when finetune.py has checked its flags

        return idea_trainer(strengths)(*args, **kwargs)

    finetune.main(rest, make_trainer)


def _parse(idea: str) -> tuple[str, float]:
    name, _, number = idea.partition("=")
    try:
        strength = float(number)
    except ValueError:
        raise ValueError(f"idea: {idea!r} is not NAME=NUMBER, for example shallow_gradient=0.3") from None
    if not math.isfinite(strength):
        raise ValueError(f"idea: {idea!r} is not allowed; use a finite number")
    return name, strength


if __name__ == "__main__":
    main()
