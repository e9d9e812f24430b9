"""What train_m3.py loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datasets import Dataset

from run_scripts.shared.llava import load_llava
from trainer.m3.arguments import M3TrainingArguments
from trainer.m3.conversations import ConversationCollator, check_conversations, read_conversations
from trainer.m3.trainer import M3Trainer
from trainer.shared.tables import load_hub_dataset

if TYPE_CHECKING:
    from run_scripts.train_m3 import DataArguments, ModelArguments


def make_trainer(model_args: ModelArguments, data_args: DataArguments, args: M3TrainingArguments) -> M3Trainer:
    """The trainer with its model and rows; ValueError for anything that cannot be trained."""
    train, evaluation = _load_rows(data_args)
    model, processor = load_llava(
        model_args.model_name_or_path, model_args.trust_remote_code, dtype="float32", **_changes(model_args)
    )
    # Rows that do not fit the processor's template or the length are found here, before anything is written.
    ConversationCollator(processor, [1], args.max_length)(list(train.select(range(min(64, len(train))))))
    return M3Trainer(model=model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=processor)


def _changes(model_args: ModelArguments) -> dict:
    """Fields of the model's configuration that the flags change."""
    named = {name: getattr(model_args, name) for name in ("pool_position", "default_visual_tokens")}
    return {name: value for name, value in named.items() if value is not None}


def _load_rows(data: DataArguments) -> tuple[Dataset, Dataset | None]:
    if data.train_file is not None:
        train = read_conversations(data.train_file, data.image_dir)
    else:
        table = load_hub_dataset(str(data.dataset_name), data.dataset_config, split=data.train_split)
        train = check_conversations(table, data.image_dir or "", "dataset_name")
    if data.eval_file is None:
        return train, None
    return train, read_conversations(data.eval_file, data.image_dir, "eval_file")
