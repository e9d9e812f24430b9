"""Train a LLaVA at several numbers of visual tokens: `accelerate launch run_scripts/train_m3.py [RECIPE] [--flag ...]`.

The model is a stock LLaVA, or an earlier output of this script.
"""

import os
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli, early, output, remote_code, runs  # noqa: F401 (early acts when imported)
from trainer.m3.arguments import M3TrainingArguments


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a LLaVA, stock or nested."})
    pool_position: str | None = field(
        default=None,
        metadata={"help": "Pool image features after_projector or before_projector. Default: the model's setting, "
                  "after_projector for a stock LLaVA."},
    )  # fmt: skip
    default_visual_tokens: int | None = field(
        default=None,
        metadata={"help": "Visual tokens per image if a call of the saved model does not choose. Default: the model's "
                  "setting, all of them for a stock LLaVA."},
    )  # fmt: skip
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it learns from."""

    _argument_group_name = "data"

    train_file: str | None = field(
        default=None,
        metadata={"help": "json, jsonl or parquet: rows of image or images, and messages (role, content) or LLaVA's "
                  "conversations (from, value)."},
    )  # fmt: skip
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset to train on."})
    eval_file: str | None = field(
        default=None, metadata={"help": "Rows to score at every level, in a format of train_file."}
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to. Default: the folder of the file."}
    )


def main(argv=None) -> None:
    """Parse, check everything, train, save."""
    parser = cli.Parser((ModelArguments, DataArguments, M3TrainingArguments))
    with runs.training_run(parser, argv, check) as run:
        from run_scripts.training import m3

        model_args, data_args, args = run.arguments
        trainer = m3.make_trainer(model_args, data_args, args)
        run.begin(trainer)
        run.train()
        with run.saving():
            trainer.save_model()
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        if trainer.is_world_process_zero():
            with cli.writing(args.output_dir):
                trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
                if metrics:
                    output.write_json(os.path.join(args.output_dir, "results.json"), metrics)
            for size in trainer.level_shares if metrics else ():
                accuracy, loss = (metrics[f"eval_{name}_{size}"] for name in ("accuracy", "loss"))
                print(f"{size:>5} visual tokens: accuracy {accuracy:.4f}, loss {loss:.4f}")


def check(model_args: ModelArguments, data_args: DataArguments) -> None:
    """ValueError for wrong input that shows without the libraries that the training needs."""
    cli.exactly_one(data_args, "train_file", "dataset_name", "the rows")
    checks.check_files("train_file", data_args.train_file)
    checks.check_files("eval_file", data_args.eval_file)
    checks.check_model(model_args.model_name_or_path)


if __name__ == "__main__":
    main()
