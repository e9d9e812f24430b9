"""Choose a size for a budget: `python run_scripts/plan.py --model_name_or_path M --results R/results.json ...`."""

import itertools
import json
import math
import os
from dataclasses import dataclass, field

from retrieval.planning import BYTES, Cell, Limits, as_rows, choose, pareto, plan
from retrieval.reading import Malformed, read_texts
from run_scripts.evaluate import choose_sizes
from run_scripts.shared import checks, cli, remote_code


@dataclass
class PlanArguments:
    """What is measured, and what a size may cost at most."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    results: str | None = field(
        default=None,
        metadata={"help": "results.json of evaluate.py, for the scores; without it, sizes only have costs."},
    )
    sizes: list[str] = field(
        default_factory=lambda: ["ladder"],
        metadata={"help": "ladder (the model's own), grid (every layer by every dim of the ladder), or LAYERSxDIM ..."},
    )
    texts: str | None = field(
        default=None,
        metadata={"help": "Texts like yours, in a format that encode.py reads. Default: Python's documentation."},
    )
    max_ms_per_text: float | None = field(default=None, metadata={"help": "Most milliseconds that one text may take."})
    max_bytes_per_vector: float | None = field(default=None, metadata={"help": "Most bytes that a vector may take."})
    min_score: float | None = field(default=None, metadata={"help": "Lowest score allowed."})
    corpus_size: int | None = field(default=None, metadata={"help": "Texts to embed; shows hours and gigabytes."})
    precision: str = field(
        default="float32", metadata={"help": f"Precision of the stored vectors: {', '.join(BYTES)}."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest text in tokens. Default: the model's."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for plan.json and plan.png."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, measure, choose, print."""
    with cli.user_errors():
        (args,) = cli.Parser((PlanArguments,)).parse(argv)
        limits = Limits(args.max_ms_per_text, args.max_bytes_per_vector, args.min_score)
        check(args)

        from run_scripts.shared import models, output

        scores = read_scores(args.results) if args.results else None
        model = models.to_device(models.load_encoder(args.model_name_or_path, trust_remote_code=args.trust_remote_code))
        models.check_max_length(model, args.max_length)
        sizes = choose_sizes(model, args.sizes)
        if scores is not None and not any(str(size) in scores for size in sizes):
            raise ValueError(f"results: {args.results} has scores of {', '.join(scores)}, and of none of the sizes")
        texts = _texts(args.texts)
        cells = plan(model, sizes, texts, scores, args.precision, args.max_length)
        print(table(cells, args.corpus_size))
        if args.output_dir:
            os.makedirs(args.output_dir, exist_ok=True)
            output.write_json(os.path.join(args.output_dir, "plan.json"), as_rows(cells))
            draw(cells, os.path.join(args.output_dir, "plan.png"), args.model_name_or_path)
        best, reason = choose(cells, limits)
    print(f"\n{best.size}: {reason}")
    num_layers, dim = best.size.split("x")
    load = f"TwoDMSEModel.from_pretrained({args.model_name_or_path!r}, num_layers={num_layers})"
    print(f"Use it: {load}.encode(texts, dim={dim})")


def check(args: PlanArguments) -> None:
    """ValueError for a flag that is not allowed."""
    if args.min_score is not None and args.results is None:
        raise ValueError("min_score: name the scores with --results")
    for name in ("corpus_size", "max_length"):
        checks.check_at_least(name, getattr(args, name), 1)
    checks.check_choice("precision", args.precision, tuple(BYTES))
    checks.check_chosen_sizes(args.sizes, args.model_name_or_path)
    checks.check_files("texts", args.texts)
    checks.check_files("results", args.results)
    checks.check_model(args.model_name_or_path)


def read_scores(path: str) -> dict[str, float]:
    """The mean over tasks of the main metric, by size."""
    from trainer.evaluation import mean_scores

    try:
        with open(path, encoding="utf-8") as file:
            scores = mean_scores(json.load(file))
        if not all(map(math.isfinite, scores.values())):
            raise ValueError("it has a score that is not finite")
        return scores
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"results: {path} is not a results.json of evaluate.py: {error}") from error


def table(cells: list[Cell], corpus_size: int | None) -> str:
    """A line per size; those on the Pareto front are marked."""
    front = pareto(cells)
    titles = ["size", "score", "ms/text", "texts/s", "parameters", "MB", "bytes/vector"]
    titles += ["hours", "GB"] if corpus_size else []
    lines = ["".join(f"{title:>14}" for title in titles)]
    for cell in cells:
        score = "-" if cell.score is None else f"{cell.score:.4f}"
        values = [cell.size, score, f"{cell.ms_per_text:.2f}", f"{cell.texts_per_second:.0f}", f"{cell.parameters:,}"]
        values += [f"{cell.memory_mb:.1f}", f"{cell.bytes_per_vector:g}"]
        if corpus_size:
            hours = corpus_size / cell.texts_per_second / 3600
            values += [f"{hours:.2f}", f"{corpus_size * cell.bytes_per_vector / 1e9:.3f}"]
        lines.append("".join(f"{value:>14}" for value in values) + ("  *" if cell in front else ""))
    return "\n".join([*lines, "* no other size is as good in score, time and bytes"])


def draw(cells: list[Cell], path: str, model: str) -> None:
    """Plot score over milliseconds, a point per size with its area by bytes; a line joins the front."""
    from matplotlib.figure import Figure

    from run_scripts.shared import plots

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    points = [cell for cell in cells if cell.score is not None]
    front = sorted(pareto(points), key=lambda cell: cell.ms_per_text)
    for cell in points:
        color = plots.COLORS["front" if cell in front else "other"]
        axis.scatter(cell.ms_per_text, cell.score, s=10 + cell.bytes_per_vector / 8, alpha=0.6, color=color)
        axis.annotate(cell.size, (cell.ms_per_text, cell.score), fontsize=7, xytext=(4, 4), textcoords="offset points")
    line = {"color": plots.COLORS["front"], "linewidth": 1, "label": "no other size is as good"}
    axis.plot([c.ms_per_text for c in front], [c.score for c in front], **line)
    axis.set(xlabel="ms for one text (area: bytes of a vector)", ylabel="score")
    axis.margins(x=0.12, y=0.08)  # room for the names
    axis.legend(fontsize=8)
    plots.set_title(axis, plots.public_name(model))
    axis.grid(alpha=0.3)
    plots.save_picture(figure, path)


def _texts(path: str | None) -> list[str]:
    if path is None:
        from run_scripts.shared.quickstart import python_docs

        return python_docs()[1]["anchor"][:128]
    texts = []
    try:
        for item in itertools.islice(read_texts(path), 128):
            if isinstance(item, Malformed):
                raise ValueError(f"texts: line {item.line} of {path} is malformed: {item.reason}")
            texts.append(item.text)
    except ValueError as error:
        raise ValueError(str(error).replace("input:", "texts:", 1)) from error
    return texts


if __name__ == "__main__":
    main()
