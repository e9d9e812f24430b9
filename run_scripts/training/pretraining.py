"""The steps of pretrain.py: load and report."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from modeling_2dmse import StarbucksConfig, StarbucksForMaskedAutoencoding, parse_ladder
from run_scripts.shared import models, output, remote_code
from trainer.shared.tables import load_hub_dataset
from trainer.shared.texts import check_corpus, read_corpus
from trainer.smae.arguments import SmaeTrainingArguments
from trainer.smae.corpus import endless, pack
from trainer.smae.masking import check_tokenizer
from trainer.smae.trainer import SmaeTrainer

if TYPE_CHECKING:
    from run_scripts.pretrain import DataArguments, ModelArguments


def make_trainer(model_args: ModelArguments, data_args: DataArguments, args: SmaeTrainingArguments) -> SmaeTrainer:
    """The trainer with its model and texts; ValueError for anything that cannot be trained."""
    with remote_code.named(model_args.model_name_or_path):
        model = _load_model(model_args, args)
        tokenizer = model.encoder.tokenizer
    check_tokenizer(tokenizer)
    models.check_training_length(args, model.encoder.max_length)
    length = min(args.max_length, model.encoder.max_length)
    train, evaluation = _load_texts(data_args, args, tokenizer, length)
    return SmaeTrainer(model=model, args=args, train_dataset=train, eval_dataset=evaluation)


def report(trainer: SmaeTrainer, before: dict, metrics: dict) -> None:
    """Print the masked accuracy of each size before and after, and the share of the most frequent token."""
    if not metrics:
        return
    output.write_json(os.path.join(trainer.args.output_dir, "results.json"), {"before": before, "after": metrics})
    columns = {}
    for kind, title in (("mlm", "MLM"), ("mae", "MAE")):
        for when, entry in (("before", before), ("after", metrics)):
            columns[f"{title} {when}"] = {s: entry[f"eval_accuracy_{kind}_{s}"] for s in trainer.ladder}
    print("\nShare of masked tokens that are predicted correctly:\n")
    print(output.score_table(columns, trainer.model.ladder, "size"))
    shares = " and ".join(f"{metrics[f'eval_unigram_{kind}']:.4f}" for kind in ("mlm", "mae"))
    print(f"\nThe most frequent token alone would give {shares}.")


def _load_model(model_args: ModelArguments, args: SmaeTrainingArguments) -> StarbucksForMaskedAutoencoding:
    path = models.resolve_model(model_args.model_name_or_path)
    trust = {"trust_remote_code": model_args.trust_remote_code}
    config = models.read_config(path, **trust)
    if config.model_type == StarbucksConfig.model_type:
        model = StarbucksForMaskedAutoencoding.from_pretrained(path, **trust)
        ladder = [str(size) for size in parse_ladder(args.sizes)] if args.sizes else None
        if ladder and ladder != list(map(str, model.ladder)):
            raise ValueError(f"sizes: {path} is trained for {' '.join(map(str, model.ladder))}; leave --sizes out")
        return model
    if args.sizes:
        parse_ladder(args.sizes, config.num_hidden_layers, config.hidden_size)
    return StarbucksForMaskedAutoencoding.from_backbone(path, sizes=args.sizes, pooling=model_args.pooling, **trust)


def _load_texts(data: DataArguments, args: SmaeTrainingArguments, tokenizer, length: int):
    """The training texts, and the texts to evaluate on or None."""
    if data.train_file is not None:
        train = read_corpus(data.train_file, data.text_column, data.streaming)
    else:
        name, config = str(data.dataset_name), data.dataset_config
        train = load_hub_dataset(name, config, split=data.train_split, streaming=data.streaming)
        train = check_corpus(train, data.text_column, "dataset_name")
    evaluation = None
    if data.eval_file is not None:
        column = "text" if data.eval_file.removesuffix(".gz").endswith(".txt") else data.text_column
        evaluation = read_corpus(data.eval_file, column, argument="eval_file").shuffle(seed=args.seed)
        evaluation = evaluation.select(range(min(data.max_eval_samples, len(evaluation))))
    if data.packing:
        with args.main_process_first(desc="packing texts"):
            train = pack(train, tokenizer, length)
            evaluation = None if evaluation is None else pack(evaluation, tokenizer, length)
    return (endless(train, args.seed) if data.streaming else train), evaluation
