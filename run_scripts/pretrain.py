"""Pre-train every size of an elastic encoder (SMAE): `accelerate launch run_scripts/pretrain.py [RECIPE] [--flag ...]`.

The encoder to fine-tune from is written to OUT/encoder.
"""

import os
from dataclasses import dataclass, field

import datasets

from modeling_2dmse import StarbucksConfig, StarbucksForMaskedAutoencoding, parse_ladder
from run_scripts.shared import cli, models, output, runs
from trainer.smae.arguments import SmaeTrainingArguments
from trainer.smae.corpus import check_corpus, endless, pack, read_corpus
from trainer.smae.masking import check_tokenizer
from trainer.smae.trainer import SmaeTrainer


@dataclass
class ModelArguments:
    """What is pre-trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of a masked-language model (its head is kept), any other encoder, a "
                  "TwoDMSE model, or an earlier output of this script."},
    )  # fmt: skip
    pooling: str | None = field(
        default=None,
        metadata={"help": "Pooling that the encoder is saved with: mean, cls, lasttoken or weightedmean. Default: what "
                  "the model's folder declares, else mean."},
    )  # fmt: skip


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it reads."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Plain text (.txt, a paragraph a line), or csv, tsv, jsonl, parquet with a text column; each "
                  "also .gz."},
    )  # fmt: skip
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, in place of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset to train on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    streaming: bool = field(default=False, metadata={"help": "Read the texts as they are needed; needs --max_steps."})
    packing: bool = field(
        default=False,
        metadata={"help": "Join texts and cut them into blocks of max_length tokens. Default: a text a row, longer "
                  "ones cropped at random."},
    )  # fmt: skip
    eval_file: str | None = field(default=None, metadata={"help": "Texts to measure on, as train_file."})
    max_eval_samples: int = field(
        default=500, metadata={"help": "Measure on this many of its texts, drawn by the seed."}
    )


def main(argv=None) -> None:
    """Parse, check everything, pre-train, save."""
    runs.use_all_cores()
    with cli.user_errors():
        parser = cli.Parser((ModelArguments, DataArguments, SmaeTrainingArguments))
        model_args, data_args, args = parser.parse(argv)
        resume = runs.find_checkpoint(args)
        runs.check_output_dir(args.output_dir, allowed=bool(resume) or data_args.overwrite)
        model = _load_model(model_args, args)
        tokenizer = model.encoder.tokenizer
        check_tokenizer(tokenizer)
        length = min(args.max_length, model.encoder.max_length)
        train, evaluation = _load_texts(data_args, args, tokenizer, length)
        trainer = SmaeTrainer(model=model, args=args, train_dataset=train, eval_dataset=evaluation)
        previous = runs.move_aside(args) if data_args.overwrite and not resume else None
    before = trainer.evaluate() if evaluation is not None else {}
    with runs.training_errors(trainer):
        trainer.train(resume_from_checkpoint=resume)
    encoder = os.path.join(args.output_dir, "encoder")
    with runs.training_errors(trainer):
        trainer.save_model()
        if args.should_save:
            trainer.model.save_encoder(encoder)
    metrics = trainer.evaluate() if evaluation is not None else {}
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
        _report(trainer, before, metrics, args.output_dir)
        runs.remove(previous)
        print(f"\nFine-tune it: accelerate launch run_scripts/finetune.py --model_name_or_path {encoder} ...")
    trainer.accelerator.end_training()


def _load_model(model_args: ModelArguments, args: SmaeTrainingArguments) -> StarbucksForMaskedAutoencoding:
    path = models.resolve_model(model_args.model_name_or_path)
    config = models.read_config(path)
    if config.model_type == StarbucksConfig.model_type:
        model = StarbucksForMaskedAutoencoding.from_pretrained(path)
        ladder = [str(size) for size in parse_ladder(args.sizes)] if args.sizes else None
        if ladder and ladder != list(map(str, model.ladder)):
            raise ValueError(f"sizes: {path} is trained for {' '.join(map(str, model.ladder))}; leave --sizes out")
        return model
    if args.sizes:
        parse_ladder(args.sizes, config.num_hidden_layers, config.hidden_size)
    return StarbucksForMaskedAutoencoding.from_backbone(path, sizes=args.sizes, pooling=model_args.pooling)


def _load_texts(data: DataArguments, args: SmaeTrainingArguments, tokenizer, length: int):
    """The training texts, and the ones to measure on or None."""
    if (data.train_file is None) == (data.dataset_name is None):
        raise ValueError("train_file: name the texts with either --train_file or --dataset_name")
    if data.train_file is not None:
        train = read_corpus(data.train_file, data.text_column, data.streaming)
    else:
        train = datasets.load_dataset(
            data.dataset_name, data.dataset_config, split=data.train_split, streaming=data.streaming
        )
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


def _report(trainer: SmaeTrainer, before: dict, metrics: dict, folder: str) -> None:
    """Print the masked accuracy of each size before and after, beside the most frequent token's share."""
    if not metrics:
        return
    output.write_json(os.path.join(folder, "results.json"), {"before": before, "after": metrics})
    columns = {}
    for kind, title in (("mlm", "MLM"), ("mae", "MAE")):
        for when, entry in (("before", before), ("after", metrics)):
            columns[f"{title} {when}"] = {s: entry[f"eval_accuracy_{kind}_{s}"] for s in trainer.ladder}
    print("\nMasked tokens found, of 1:\n")
    print(output.score_table(columns, trainer.model.ladder, "size"))
    shares = " and ".join(f"{metrics[f'eval_unigram_{kind}']:.4f}" for kind in ("mlm", "mae"))
    print(f"\nAlways naming the most frequent of them would find {shares}.")


if __name__ == "__main__":
    main()
