"""Evaluate an elastic encoder at every size: `python run_scripts/evaluate.py --model_name_or_path M --sts_files F`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, remote_code

if TYPE_CHECKING:
    from modeling_2dmse import Size, TwoDMSEModel

# The title of the mean over the tasks, in the table that is printed.
MEAN = "mean"


@dataclass
class EvaluationArguments:
    """What is evaluated on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    output_dir: str = field(metadata={"help": "Folder for results.json and heatmap.png."})
    sts_files: list[str] | None = field(
        default=None, metadata={"help": "Tables (sentence1, sentence2, score): csv, tsv, jsonl, parquet, also .gz."}
    )
    beir_dirs: list[str] | None = field(default=None, metadata={"help": "Folders in BEIR layout."})
    mteb_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Names of MTEB's tasks, for example STSBenchmark SciFact; needs the extra mteb. MTEB's own "
                  "results are written to mteb/SIZE/TASK.json."},
    )  # fmt: skip
    update_card: bool = field(
        default=False, metadata={"help": "Put the scores of MTEB into the README.md of the model's folder as well."}
    )
    split: str = field(default="test", metadata={"help": "Split of the qrels in the BEIR folders."})
    sizes: list[str] = field(
        default_factory=lambda: ["ladder"],
        metadata={"help": "ladder (the model's own), grid (every layer by every dim of the ladder), or LAYERSxDIM ..."},
    )
    cross_sizes: bool = field(
        default=False,
        metadata={"help": "For retrieval, also nDCG@10 of queries at each size against documents at each other size."},
    )
    pooling: str | None = field(default=None, metadata={"help": "Pooling, for a model whose folder does not set it."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Most texts per batch. Default: as many tokens as suit the device."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest text in tokens. Default: the model's."})
    max_query_length: int | None = field(
        default=None, metadata={"help": "Longest query of retrieval in tokens. Default: max_length."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of an earlier evaluation."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, load, evaluate, write."""
    with cli.user_errors():
        (args,) = cli.Parser((EvaluationArguments,)).parse(argv)
        check(args)

        from run_scripts.shared import models, output, plots
        from trainer.evaluation import (
            evaluate_tasks,
            load_beir,
            load_sts,
            main_scores,
            mean_scores,
            metric_name,
            name_apart,
        )

        tasks = [load_sts(path) for path in args.sts_files or []]
        tasks += [load_beir(folder, args.split) for folder in args.beir_dirs or []]
        mteb_tasks = load_mteb(args.mteb_tasks)
        taken = [MEAN, *(task.metadata.name for task in mteb_tasks)]
        tasks = name_apart(tasks, [*(args.sts_files or []), *(args.beir_dirs or [])], taken)
        options = {"pooling": args.pooling, "trust_remote_code": args.trust_remote_code}
        model = models.to_device(models.load_encoder(args.model_name_or_path, **options))
        models.check_max_length(model, args.max_length)
        models.check_max_length(model, args.max_query_length, "max_query_length")
        sizes = choose_sizes(model, args.sizes)
        os.makedirs(args.output_dir, exist_ok=True)
    started = time.perf_counter()
    results = {"model": args.model_name_or_path}
    options = {"batch_size": args.batch_size, "max_length": args.max_length, "max_query_length": args.max_query_length}
    results |= evaluate_tasks(model, tasks, sizes, args.cross_sizes, **options)
    if mteb_tasks:
        results["mteb"] = run_mteb(args, model, mteb_tasks, sizes, options)
    columns = main_scores(results)
    if len(columns) > 1:
        columns[MEAN] = mean_scores(results)
    if args.sizes == ["grid"]:
        metrics = {task: f", {metric_name(task, results)}" for task in main_scores(results)}
        tables = {name + metrics.get(name, ""): output.grid_table(scores, sizes) for name, scores in columns.items()}
        print("\n\n".join(f"{title}\n{table}" for title, table in tables.items()))
    else:
        print(output.score_table(columns, sizes, "size"))
    for name, task in results.get("retrieval", {}).items() if args.cross_sizes else ():
        table = task["cross_ndcg@10"]
        columns = {f"d {d}": {str(q): table[str(q)][str(d)] for q in sizes} for d in sizes}
        print(f"\n{name}, nDCG@10: queries down, documents across\n{output.score_table(columns, sizes, 'queries')}")
    with cli.writing(args.output_dir):
        output.write_json(os.path.join(args.output_dir, "results.json"), results)
        plots.save_heatmap(results, sizes, model.config.ladder, os.path.join(args.output_dir, "heatmap.png"))
    print(f"\n{time.perf_counter() - started:.1f} s; written to {args.output_dir}")


def check(args: EvaluationArguments) -> None:
    """ValueError for a flag that is not allowed."""
    if not args.sts_files and not args.beir_dirs and not args.mteb_tasks:
        raise ValueError("sts_files: name something to evaluate on with --sts_files, --beir_dirs or --mteb_tasks")
    if args.update_card and not args.mteb_tasks:
        raise ValueError("update_card: only the scores of --mteb_tasks are put into a card; name some")
    if args.update_card and not os.path.isfile(os.path.join(args.model_name_or_path, "README.md")):
        raise ValueError(f"update_card: {args.model_name_or_path} is not a folder with a README.md")
    if args.pooling is not None:
        checks.check_choice("pooling", args.pooling, checks.POOLINGS)
    for name in ("batch_size", "max_length", "max_query_length"):
        checks.check_at_least(name, getattr(args, name), 1)
    checks.check_no_results(args.output_dir, args.overwrite)
    if args.cross_sizes and not args.beir_dirs:
        raise ValueError("cross_sizes: only retrieval has queries and documents; name some with --beir_dirs")
    checks.check_chosen_sizes(args.sizes, args.model_name_or_path)
    checks.check_files("sts_files", *(args.sts_files or []))
    checks.check_beir_dirs("beir_dirs", args.beir_dirs or [], args.split)
    checks.check_model(args.model_name_or_path)


def load_mteb(names: list[str] | None) -> list:
    """MTEB's tasks of these names, with their data; ValueError if they cannot be had."""
    if not names:
        return []
    from trainer.mteb_tasks import load_tasks

    return load_tasks(names)


def run_mteb(args: EvaluationArguments, model: TwoDMSEModel, tasks: list, sizes: list[Size], options: dict) -> dict:
    """The scores of MTEB's tasks, which are also written to mteb/SIZE/TASK.json and, if asked for, to the card."""
    from trainer.model_card import add_mteb
    from trainer.mteb_tasks import evaluate_mteb

    name = args.model_name_or_path
    if os.path.isdir(name):
        name = os.path.basename(os.path.realpath(name))
    scores = evaluate_mteb(model, tasks, sizes, os.path.join(args.output_dir, "mteb"), name, **options)
    if args.update_card:
        add_mteb(args.model_name_or_path, {"mteb": scores}, sizes)
    return scores


def choose_sizes(model: TwoDMSEModel, names: list[str]) -> list[Size]:
    """The sizes that `ladder`, `grid` or a list of LAYERSxDIM stands for."""
    from modeling_2dmse import parse_ladder
    from trainer.evaluation import grid_sizes

    if names == ["ladder"]:
        return model.config.ladder
    if names == ["grid"]:
        return grid_sizes(model.num_layers, [size.dim for size in model.config.ladder])
    return parse_ladder(names, model.num_layers, model.config.hidden_size)


if __name__ == "__main__":
    main()
