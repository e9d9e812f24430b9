"""Pre-train every size of an elastic encoder (SMAE): `accelerate launch run_scripts/pretrain.py [RECIPE] [--flag ...]`.

The encoder to fine-tune from is written to OUT/encoder.
"""

import os
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli, early, remote_code, runs  # noqa: F401 (early acts when imported)
from trainer.smae.arguments import SmaeTrainingArguments


@dataclass
class ModelArguments:
    """What is pre-trained."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of a masked-language model (its head is kept), any other encoder, a "
                  "TwoDMSE model, or an earlier output of this script."},
    )  # fmt: skip
    pooling: str | None = field(
        default=None,
        metadata={"help": "Pooling of the saved encoder: mean, cls, lasttoken or weightedmean. Default: the pooling "
                  "that the model's folder declares, otherwise mean."},
    )  # fmt: skip
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it reads."""

    _argument_group_name = "data"

    train_file: str | None = field(
        default=None,
        metadata={"help": "Plain text (.txt, one paragraph per line), or csv, tsv, jsonl, parquet with a text column; "
                  "each also .gz."},
    )  # fmt: skip
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset to train on."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the texts while they are used; requires --max_steps."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Join texts and cut them into blocks of max_length tokens, instead of one text per row, "
                  "where longer ones are cropped at random."},
    )  # fmt: skip
    eval_file: str | None = field(default=None, metadata={"help": "Texts to evaluate on, in a format of train_file."})
    max_eval_samples: int = field(
        default=500, metadata={"help": "Evaluate on this many texts of eval_file, drawn with the seed."}
    )


def main(argv=None) -> None:
    """Parse, check everything, pre-train, save."""
    parser = cli.Parser((ModelArguments, DataArguments, SmaeTrainingArguments))
    with runs.training_run(parser, argv, check) as run:
        from run_scripts.training import pretraining

        model_args, data_args, args = run.arguments
        trainer = pretraining.make_trainer(model_args, data_args, args)
        run.begin(trainer)
        evaluates = trainer.eval_dataset is not None
        before = trainer.evaluate() if evaluates else {}
        run.train()
        encoder = os.path.join(args.output_dir, "encoder")
        with run.saving():
            trainer.save_model()
            if args.should_save:
                trainer.model.save_encoder(encoder)
        metrics = trainer.evaluate() if evaluates else {}
        if trainer.is_world_process_zero():
            with cli.writing(args.output_dir):
                trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
                pretraining.report(trainer, before, metrics)
            print(f"\nFine-tune it: accelerate launch run_scripts/finetune.py --model_name_or_path {encoder} ...")


def check(model_args: ModelArguments, data_args: DataArguments) -> None:
    """ValueError for wrong input that shows without the libraries that the training needs."""
    cli.exactly_one(data_args, "train_file", "dataset_name", "the texts")
    checks.check_at_least("max_eval_samples", data_args.max_eval_samples, 1)
    checks.check_files("train_file", data_args.train_file)
    checks.check_files("eval_file", data_args.eval_file)
    checks.check_model(model_args.model_name_or_path)


if __name__ == "__main__":
    main()
