"""The steps of classify.py: make a trainer, load a trained classifier, time its cascade, show its results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, set_seed

from modeling_2dmse.loading import check_weights
from modeling_mrl import MatryoshkaConfig, MatryoshkaForImageClassification, MatryoshkaForSequenceClassification
from modeling_mrl.backbone import count_positions
from modeling_mrl.classifier import MatryoshkaClassifier
from retrieval.checking import Kinds, check_fields
from run_scripts.shared import models, output, remote_code
from run_scripts.shared.measure import in_turn, row, seconds
from trainer.mrl.arguments import ClassifierTrainingArguments
from trainer.mrl.data import (
    ImageCollator,
    TextCollator,
    label_names,
    leave_out_seen,
    number_labels,
    read_examples,
    save_seen,
)
from trainer.mrl.trainer import ClassifierTrainer, evaluate_classifier
from trainer.shared.tables import hold_out

if TYPE_CHECKING:
    from run_scripts.classify import DataArguments, ModelArguments

# The file that tells fit-cascade and eval how training has read its rows.
SETTINGS_FILE = "classify.json"


class Classifier(NamedTuple):
    """A trained classifier, the folder that it comes from, its collator, and how its rows are read."""

    folder: str
    model: MatryoshkaClassifier
    collator: TextCollator | ImageCollator
    settings: dict


def make_trainer(
    model_args: ModelArguments, data: DataArguments, args: ClassifierTrainingArguments
) -> tuple[ClassifierTrainer, dict]:
    """The trainer, and the settings for SETTINGS_FILE; ValueError for anything that cannot be trained."""
    columns = [name for name in (data.text_column, data.text_pair_column) if name]
    table = read_examples(data.train_file, "train_file", columns, data.label_column)
    labels = label_names(table)
    table, evaluation = _split(table, data, columns, args.seed)
    label2id = {name: index for index, name in enumerate(labels)}
    table = number_labels(table, label2id, "train_file")
    evaluation = evaluation and number_labels(evaluation, label2id, "eval_file")
    set_seed(args.seed)  # the new heads are random
    model, processor = _build(model_args, args, labels, "image" in table.column_names)
    if not isinstance(model, MatryoshkaForImageClassification):
        models.check_training_length(data, min(processor.model_max_length, count_positions(model.backbone)))
    settings = {"text_columns": columns, "label_column": data.label_column, "max_length": data.max_length}
    collator = _collator(model, processor, settings)
    trainer = ClassifierTrainer(
        model, args, evaluation, train_dataset=table, processing_class=processor, data_collator=collator
    )
    return trainer, settings


def save_settings(trainer: ClassifierTrainer, settings: dict) -> None:
    """Save what fit-cascade and eval need to know about training: how rows are read, and which it has seen."""
    folder = trainer.args.output_dir
    output.write_json(os.path.join(folder, SETTINGS_FILE), settings)
    save_seen(folder, train=trainer.train_dataset["row_key"])


def report(trainer: ClassifierTrainer) -> None:
    """Print the accuracies on the rows that were held out or named by eval_file, if any."""
    evaluation, model = trainer.eval_dataset, trainer.model
    if evaluation is not None:
        scores = evaluate_classifier(model, evaluation, trainer.data_collator, trainer.args.per_device_eval_batch_size)
        output.say(f"\n{len(evaluation)} rows held out of training:\n\n{table_of(scores, model.config)}")


def load(folder: str, trust_remote_code: bool = False) -> Classifier:
    """The classifier that `train` has written to a folder; `trust_remote_code` is for its tokenizer or processor."""
    if not os.path.isfile(os.path.join(folder, SETTINGS_FILE)):
        raise ValueError(f"model_name_or_path: {folder} has no {SETTINGS_FILE}; train a classifier with `train` first")
    settings = _read_settings(os.path.join(folder, SETTINGS_FILE))
    with remote_code.named(folder):
        architectures = MatryoshkaConfig.from_pretrained(folder).architectures or []
        images = MatryoshkaForImageClassification.__name__ in architectures
        kind = MatryoshkaForImageClassification if images else MatryoshkaForSequenceClassification
        model = models.to_device(kind.from_pretrained(folder))
        check_weights(model, folder)
        processor = _processor(folder, images, trust_remote_code)
        return Classifier(folder, model, _collator(model, processor, settings), settings)


def _read_settings(path: str) -> dict:
    kinds: Kinds = {"text_columns": list, "label_column": str, "max_length": int}
    try:
        settings = check_fields(json.loads(Path(path).read_text(encoding="utf-8")), kinds, SETTINGS_FILE)
        columns = settings["text_columns"]
        if len(columns) not in (1, 2) or not all(isinstance(name, str) for name in columns):
            raise ValueError(f"text_columns {columns} is not allowed; it must name one column or two")
        return settings
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model_name_or_path: {path} is damaged: {error}") from error


def read_unseen(classifier: Classifier, path: str, argument: str, kinds: list[str]) -> tuple[Dataset, int]:
    """The rows of a file that were not used for `kinds` (train, fit), and the number of rows that were."""
    model, settings = classifier.model, classifier.settings
    table = read_examples(path, argument, settings["text_columns"], settings["label_column"])
    images = isinstance(model, MatryoshkaForImageClassification)
    if images != ("image" in table.column_names):
        raise ValueError(f"{argument}: {path} has {'texts' if images else 'images'}, which this model cannot classify")
    table, seen = leave_out_seen(table, classifier.folder, kinds, argument)
    return number_labels(table, model.config.label2id, argument), seen


def save_thresholds(folder: str, table: Dataset, thresholds: list[float]) -> None:
    """Write the thresholds of a cascade into config.json, and remember the rows that they were fitted on."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    save_seen(folder, fit=table["row_key"])
    output.write_json(os.path.join(folder, "config.json"), {**config, "thresholds": thresholds})


def time_cascade(model, inputs: list[dict], runs: int) -> dict:
    """Seconds of the cascade over seconds of the largest size as its own model, measured in turn, `runs` times."""
    largest = model.truncate(model.config.ladder[-1]).eval()

    @torch.inference_mode()
    def always():
        for batch in inputs:
            largest(**batch)

    def cascade():
        for batch in inputs:
            model.predict_cascade(batch)

    always(), cascade()  # what happens only once is not timed
    figures = in_turn(runs, {"cascade": lambda: seconds(cascade), "largest": lambda: seconds(always)})
    return row("cascade", "", figures["cascade"], figures["largest"], seconds=figures)


def table_of(results: dict, config: MatryoshkaConfig) -> str:
    """A row per size, then the cascade and the oracle: accuracy, dimensions, layers."""
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
    """Plot the accuracy over expected dimensions and, with several exits, over mean layers."""
    from matplotlib.figure import Figure

    from run_scripts.shared import plots

    costs = {"expected_dim": [size.dim for size in config.ladder]}
    if config.exits:
        costs["mean_layers"] = [size.num_layers for size in config.ladder]
    figure = Figure(figsize=(5 * len(costs), 3.6), layout="constrained")
    for axis, (cost, values) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True):
        accuracy = [results["accuracy"][size] for size in config.sizes]
        axis.plot(values, accuracy, marker="o", label="one size", color=plots.COLORS["one size"])
        for size, x, y in zip(config.sizes, values, accuracy, strict=True):
            axis.annotate(size, (x, y), fontsize=7, xytext=(-4, 4), textcoords="offset points", ha="right")
        for name, marker in (("cascade", "*"), ("oracle", "^")):
            if name in results:
                choice = results[name]
                point = {"marker": marker, "s": 80, "label": name, "zorder": 3, "color": plots.COLORS[name]}
                axis.scatter(choice[cost], choice["accuracy"], **point)
        if cost == "expected_dim":
            axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(set(values)), map(str, sorted(set(values))))
        axis.minorticks_off()
        axis.set(xlabel=cost.replace("_", " "), ylabel="accuracy")
        plots.set_title(axis, plots.public_name(results["model"]))
        axis.margins(x=0.1, y=0.1)  # room for the names
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    plots.save_picture(figure, path)


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
    # The model smooths the labels of every size; Trainer would smooth those of one.
    smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
    with remote_code.named(name):
        model = kind.from_backbone(
            name,
            sizes=args.sizes,
            head_type=model_args.head_type,
            pooling=model_args.pooling,
            loss_weights=model_args.loss_weights,
            loss_reduction=model_args.loss_reduction,
            label_smoothing=smoothing,
            id2label=dict(enumerate(labels)),
            trust_remote_code=model_args.trust_remote_code,
        )
        check_weights(model, name)
    return model, _processor(name, images, model_args.trust_remote_code)


def _processor(name: str, images: bool, trust_remote_code: bool):
    with remote_code.named(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        loader = AutoImageProcessor if images else AutoTokenizer
        processor = loader.from_pretrained(name, config=config, trust_remote_code=trust_remote_code)
    if not images and processor.pad_token is None:
        processor.pad_token = processor.eos_token  # padding is masked, so any token will do
    return processor


def _collator(model, processor, settings: dict):
    if isinstance(model, MatryoshkaForImageClassification):
        return ImageCollator(processor)
    longest = min(settings["max_length"], processor.model_max_length, count_positions(model.backbone))
    return TextCollator(processor, settings["text_columns"], longest)
