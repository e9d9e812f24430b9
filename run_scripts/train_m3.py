"""Train a LLaVA at several numbers of visual tokens: `accelerate launch run_scripts/train_m3.py [RECIPE] [--flag ...]`.

The model is a stock LLaVA, or an earlier output of this script.
"""

import os
from dataclasses import dataclass, field

import datasets
from datasets import Dataset

from run_scripts.shared import cli, output, runs
from run_scripts.shared.llava import load_llava
from trainer.m3.conversations import ConversationCollator, check_conversations, read_conversations
from trainer.m3.trainer import M3Trainer, M3TrainingArguments


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a LLaVA, stock or nested."})
    pool_position: str | None = field(
        default=None,
        metadata={"help": "Pool image features after_projector or before_projector. Default: the model's, which is "
                  "after_projector for a stock LLaVA."},
    )  # fmt: skip
    default_visual_tokens: int | None = field(
        default=None,
        metadata={"help": "Visual tokens an image where a call of the saved model names none. Default: the model's, "
                  "which is all of them for a stock LLaVA."},
    )  # fmt: skip


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it learns from."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Rows of an image (image, images) and a conversation (messages with role and content, or "
                  "LLaVA's conversations with from and value): json, jsonl, parquet."},
    )  # fmt: skip
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, in place of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset to train on."})
    eval_file: str | None = field(default=None, metadata={"help": "Rows to score at every level, as train_file."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that image paths start at. Default: that of the file."}
    )


def main(argv=None) -> None:
    """Parse, check everything, train, save."""
    runs.use_all_cores()
    with cli.user_errors():
        parser = cli.Parser((ModelArguments, DataArguments, M3TrainingArguments))
        model_args, data_args, args = parser.parse(argv)
        resume = runs.find_checkpoint(args)
        runs.check_output_dir(args.output_dir, allowed=bool(resume) or data_args.overwrite)
        train, evaluation = _load_rows(data_args)
        model, processor = load_llava(model_args.model_name_or_path, dtype="float32", **_changes(model_args))
        # What does not fit the processor's template or the length shows here, before anything is written.
        ConversationCollator(processor, [1], args.max_length)(list(train.select(range(min(64, len(train))))))
        trainer = M3Trainer(
            model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=processor
        )
        previous = runs.move_aside(args) if data_args.overwrite and not resume else None
    with runs.training_errors(trainer):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    metrics = trainer.evaluate() if evaluation is not None else {}
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
        if metrics:
            output.write_json(os.path.join(args.output_dir, "results.json"), metrics)
            for size in trainer.level_shares:
                accuracy, loss = (metrics[f"eval_{name}_{size}"] for name in ("accuracy", "loss"))
                print(f"{size:>5} visual tokens: accuracy {accuracy:.4f}, loss {loss:.4f}")
        runs.remove(previous)
    trainer.accelerator.end_training()


def _changes(model_args: ModelArguments) -> dict:
    """What the model's configuration is to say other than it does."""
    named = {name: getattr(model_args, name) for name in ("pool_position", "default_visual_tokens")}
    return {name: value for name, value in named.items() if value is not None}


def _load_rows(data: DataArguments) -> tuple[Dataset, Dataset | None]:
    if (data.train_file is None) == (data.dataset_name is None):
        raise ValueError("train_file: name the rows with either --train_file or --dataset_name")
    if data.train_file is not None:
        train = read_conversations(data.train_file, data.image_dir)
    else:
        table = datasets.load_dataset(data.dataset_name, data.dataset_config, split=data.train_split)
        train = check_conversations(table, data.image_dir or "", "dataset_name")
    if data.eval_file is None:
        return train, None
    return train, read_conversations(data.eval_file, data.image_dir, "eval_file")


if __name__ == "__main__":
    main()
