"""The steps of finetune.py: load, save, evaluate, write the card, push."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset

from modeling_2dmse import Size, TwoDMSEModel, parse_ladder
from modeling_2dmse.configuration_2dmse import default_ladder
from run_scripts.shared import cli, models, output, output_dir, plots, secrets
from run_scripts.shared.quickstart import DATASET_NAME, MODEL_NAME, python_docs
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, model_card
from trainer.base_card import BaseFacts, read_base_facts
from trainer.data import check_table, draw_texts, join_tables, query_document_prompts, text_columns, texts_to_fit
from trainer.evaluation import (
    RetrievalData,
    StsData,
    best_for_cost,
    check_varied,
    grid_sizes,
    main_scores,
    mean_scores,
    task_from_table,
)
from trainer.exits import refine_exits
from trainer.preparation import resolve_ladder, set_comparison
from trainer.projections import fit_exit_projections
from trainer.scoring import check_metric
from trainer.shared.hub import find_token, stage, upload
from trainer.shared.tables import draw_rows, hold_out, is_saved, load_hub_dataset, read_splits, read_table
from trainer.unlabeled import read_unlabeled_texts

if TYPE_CHECKING:
    from run_scripts.elasticize import EncoderArguments
    from run_scripts.finetune import DataArguments, ModelArguments

# The number of texts that the encoding times of the card are measured on.
COST_ROWS = 64
# Pictures of runs, and their titles on a card.
PICTURES = {"heatmap.png": "Every layer by every dim", "shares.png": "Share of the full size's score, by cost"}


def make_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TwoDMSETrainingArguments,
    trainer_class: type[TwoDMSETrainer] | None = None,
) -> tuple[TwoDMSETrainer, list[StsData | RetrievalData]]:
    """The trainer and what it is evaluated on; ValueError for anything that cannot be trained."""
    train, evaluation = load_tables(data_args, args)
    rows = sum(map(len, train))
    _check_batches(args, rows)
    encoder = load_model(model_args, args)
    models.check_training_length(args, encoder.max_length)
    unlabeled = None
    if data_args.unlabeled_file is not None:
        # With the seed of the rows, the same ones would be drawn if both come from one file.
        unlabeled = read_unlabeled_texts(data_args.unlabeled_file, rows, args.seed + 1)
    model = _add_adapters(encoder, model_args, args, train, unlabeled)
    name = os.path.basename(data_args.eval_file).split(".")[0] if data_args.eval_file else "eval"
    tasks = [] if evaluation is None else [task_from_table(name, evaluation)]
    trainer = (trainer_class or TwoDMSETrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=tasks,
        unlabeled_texts=unlabeled,
        guide=_load_guide(model_args),
    )
    check_metric(args, tasks)
    return trainer, tasks


def find_start(trainer: TwoDMSETrainer) -> str | None:
    """A checksum of what the initial weights come from; None if a resumed run does not need them."""
    args, encoder = trainer.args, trainer.encoder
    if not args.initial_share and args.teacher != "start":
        return None
    texts: list[str] = []
    if args.exit_projections:
        texts = texts_to_fit(trainer.train_tables, trainer.train_dataset, args.seed, encoder.config.prompts)
    return output_dir.checksum([models.fingerprint(encoder), list(map(str, trainer.ladder)), texts])


def load_tables(data: DataArguments, args: TwoDMSETrainingArguments) -> tuple[list[Dataset], Dataset | None]:
    """The checked training tables, and the one to evaluate on or None."""
    evaluation = None
    if data.dataset_name == DATASET_NAME:
        with args.main_process_first(desc="reading the Python documentation"):
            train, evaluation = python_docs()
        evaluation = evaluation.shuffle(seed=args.seed).select(range(min(data.max_eval_samples, len(evaluation))))
        tables = [train]
    elif data.dataset_name is not None:
        tables = [load_hub_dataset(data.dataset_name, data.dataset_config, split=data.train_split)]
        if data.eval_split is not None:
            evaluation = load_hub_dataset(data.dataset_name, data.dataset_config, split=data.eval_split)
    else:
        tables = [table for path in data.train_file or [] for table in _read_training(path, data.train_split)]
    evaluation = _read_evaluation(data) or evaluation
    tables = [_check(table, "train_file" if data.train_file else "dataset_name", data, tables) for table in tables]
    if evaluation is not None:
        evaluation = _check(evaluation, "eval_file", data, [evaluation]) if data.max_eval_samples else None
        if evaluation is not None and "score" in evaluation.column_names:
            check_varied(evaluation, f"eval_file: {data.eval_file or data.eval_split}")
    elif data.max_eval_samples and min(map(len, tables)) > 1:
        share = data.max_eval_samples // len(tables)
        pairs = [hold_out(table, max(1, min(share, len(table) // 10)), args.seed) for table in tables]
        tables, evaluation = [train for train, _ in pairs], join_tables([held for _, held in pairs])
        if "score" in evaluation.column_names:
            advice = "; name other rows with --eval_file, or pass --max_eval_samples 0 for no evaluation"
            check_varied(evaluation, "max_eval_samples: what is held out of the training data", advice)
        rows = "one row is" if len(evaluation) == 1 else f"{len(evaluation)} rows are"
        output.say(f"without evaluation data, {rows} held out of the training data (--max_eval_samples)")
    return [draw_rows(table, data.max_train_samples, args.seed) for table in tables], evaluation


def _read_training(path: str, split: str) -> list[Dataset]:
    return read_splits(path, "train_file", split) if is_saved(path) else [read_table(path)]


def _read_evaluation(data: DataArguments) -> Dataset | None:
    """The table of --eval_file, or else the --eval_split of a folder in --train_file; None if neither is given."""
    if data.eval_file is not None:
        return read_table(data.eval_file, "eval_file", data.eval_split or "validation")
    if data.eval_split is not None and data.train_file is not None:
        folders = [path for path in data.train_file if is_saved(path)]
        if not folders:
            raise ValueError("eval_split: train_file has no splits; name a table to evaluate on with --eval_file")
        return read_table(folders[0], "train_file", data.eval_split)
    return None


def _check(table: Dataset, argument: str, data: DataArguments, tables: Sequence[Dataset]) -> Dataset:
    """`check_table` with those of --columns that the table has; the others must be in another one of the tables."""
    columns = data.columns or []
    if argument != "eval_file":
        present = {name for other in tables for name in other.column_names}
        columns = [entry for entry in columns if entry.rpartition(":")[0] in table.column_names or
                   entry.rpartition(":")[0] not in present]  # fmt: skip
    else:
        columns = [entry for entry in columns if entry.rpartition(":")[0] in table.column_names]
    return check_table(table, argument, columns, data.skip_invalid)


def save(trainer: TwoDMSETrainer, model_args: ModelArguments) -> TwoDMSEModel:
    """Write the model folder; adapters are merged into the weights first."""
    if not model_args.lora_r:
        trainer.save_model()
        return trainer.encoder
    trainer.check_finite()
    merged = trainer.model.merge_and_unload()
    if trainer.args.should_save:
        merged.save_pretrained(trainer.args.output_dir)
    trainer.encoder = merged
    return merged


def evaluate(trainer: TwoDMSETrainer, encoder: TwoDMSEModel, tasks, before: dict) -> dict:
    """Score the whole grid, write results.json and heatmap.png, print the ladder before and after; the results."""
    folder = trainer.args.output_dir
    results: dict = {"model": folder}
    if not tasks:
        return results
    sizes = grid_sizes(encoder.num_layers, [size.dim for size in trainer.ladder])
    results |= trainer.results(tasks, sizes)
    results["before"] = before
    if trainer.is_world_process_zero():
        with cli.writing(folder):
            output.write_json(os.path.join(folder, "results.json"), results)
            plots.save_heatmap(results, sizes, trainer.ladder, os.path.join(folder, "heatmap.png"))
        old, new = mean_scores(before), mean_scores(results)
        gain = {size: new[size] - old[size] for size in old}
        metric = "Spearman" if "sts" in results else "nDCG@10"
        print(f"\n{metric} on {', '.join(main_scores(results))}, untrained and trained:\n")
        print(output.score_table({"before": old, "after": new, "gain": gain}, trainer.ladder, "size"))
        print(f"\nEvery layer by every dim: {os.path.join(folder, 'heatmap.png')}")
    return results


def write_card(
    trainer: TwoDMSETrainer,
    encoder: TwoDMSEModel,
    model_args: ModelArguments,
    data_args: DataArguments,
    results: dict,
) -> None:
    """The card of the run, with the cost of each size on texts of the training data."""
    folder = trainer.args.output_dir
    texts = trainer.train_dataset[:COST_ROWS][trainer.train_dataset.column_names[1]]
    # The saved model: under FSDP, a single process cannot run the trainer's.
    saved = TwoDMSEModel.from_pretrained(folder, trust_remote_code=model_args.trust_remote_code)
    saved = saved.to(trainer.args.device)
    costs = model_card.measure_costs(saved, trainer.ladder, texts, trainer.args.max_length) if texts else {}
    data = ", ".join(map(os.path.basename, data_args.train_file or [])) or data_args.dataset_name
    on_the_hub = data_args.dataset_name is not None and data_args.dataset_name != DATASET_NAME
    names = [data_args.dataset_name] if on_the_hub else []
    settings = {"data": data} | trainer.describe()
    named = data_args.eval_file or data_args.eval_split or data_args.dataset_name == DATASET_NAME
    rows = {} if named else {"eval": "its rows were held out of the training data"}
    save_card(trainer, encoder, model_args, settings, results, costs, names, "finetune", rows)


def save_card(
    trainer: TwoDMSETrainer,
    encoder: TwoDMSEModel,
    model_args: ModelArguments | EncoderArguments,
    settings: dict[str, object],
    results: dict,
    costs: dict,
    data_names: list,
    script: str,
    rows: dict[str, str],
) -> None:
    """Write the card of a run of `script`, which shows the settings, results and costs; `data_names` are Hub names, and
    `rows` says what those of a task are."""
    backbone, folder = model_args.model_name_or_path, str(trainer.args.output_dir)
    facts = BaseFacts("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", ("en",))
    if backbone != MODEL_NAME:
        facts = read_base_facts(backbone, os.path.exists(backbone))
    run = model_card.Run(
        name=os.path.basename(os.path.normpath(folder)),
        settings={"backbone": plots.public_name(backbone)} | settings,
        results=results,
        costs=costs,
        command=_command(script),
        base_model=facts.base_model,
        datasets=data_names,
        license=model_args.license or facts.license,
        languages=facts.languages,
        repo_id=trainer.args.hub_model_id,
        rows=rows,
        pictures={file: title for file, title in PICTURES.items() if os.path.exists(os.path.join(folder, file))},
    )
    card = model_card.build_card(encoder, trainer.training_objective, run)
    card.content = secrets.hide(card.content)
    model_card.write_card(folder, card)


def usage(folder: str, results: dict, ladder: Sequence[Size]) -> str:
    """The lines that load the model and encode at the size with the best score for its cost."""
    size, quoted = best_for_cost(results, ladder), json.dumps(folder, ensure_ascii=False)
    return (
        "    from twodmse import TwoDMSEModel\n"
        f"    model = TwoDMSEModel.from_pretrained({quoted}, num_layers={size.num_layers})\n"
        f'    embeddings = model.encode(["a text"], dim={size.dim})'
    )


def push(trainer: TwoDMSETrainer) -> None:
    """With --push_to_hub, upload the folder as it is now: merged weights, card, results and heat map."""
    args = trainer.args
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as staged:
            stage(args.output_dir, trainer.hub_model_id, staged)
            token = find_token(args.hub_token)
            print(upload(staged, trainer.hub_model_id, token, bool(args.hub_private_repo), args.hub_revision))


def _load_guide(model_args: ModelArguments) -> TwoDMSEModel | None:
    name = model_args.guide_model_name_or_path
    trusted = model_args.trust_remote_code
    return name and models.load_encoder(name, argument="guide_model_name_or_path", trust_remote_code=trusted)


def load_model(model_args: ModelArguments, args: TwoDMSETrainingArguments) -> TwoDMSEModel:
    """The model to train, cut to the sizes that are trained."""
    encoder = models.load_encoder(
        model_args.model_name_or_path,
        args.sizes,
        model_args.pooling,
        trust_remote_code=model_args.trust_remote_code,
    )
    sizes = args.sizes if args.sizes is not None else encoder.config.sizes
    if sizes is None:
        sizes = args.sizes = list(map(str, default_ladder(encoder.num_layers, encoder.config.dim)))
        output.say(f"without --sizes, a ladder that fits the model is trained: {' '.join(sizes)}")
    largest = parse_ladder(sizes, encoder.num_layers, encoder.config.hidden_size)[-1]
    if args.objective == "separate":
        # The small model trained separately: nothing above its size exists, in training or on disk.
        args.sizes = [str(largest)]
        return encoder.truncate(*largest)
    if args.objective == "starbucks" and largest.num_layers < encoder.num_layers:
        output.say(
            f"the ladder ends at {largest}: the layers above {largest.num_layers} are dropped, they would not train"
        )
        return encoder.truncate(largest.num_layers)
    return encoder


def _add_adapters(encoder: TwoDMSEModel, model_args: ModelArguments, args: TwoDMSETrainingArguments, tables, unlabeled):
    if not model_args.lora_r:
        return encoder
    from peft import LoraConfig, get_peft_model

    if args.exit_projections and encoder.exit_projections is None:
        # Adapters wrap whole modules, so the projections must exist before them.
        tables = [*tables, Dataset.from_dict({"text": unlabeled or []})]
        set_comparison(encoder, args)
        prompts = query_document_prompts([*text_columns(tables[0]), "text"], encoder.config.prompts)
        sizes = resolve_ladder(encoder, args)
        texts = draw_texts(tables, args.seed, prompts=prompts)
        states = fit_exit_projections(encoder, texts, keep_states=args.exit_gates, max_length=args.max_length)
        if states is not None:
            options = {"gates": True, "seed": args.seed, "max_length": args.max_length}
            refine_exits(encoder, texts, states[-1], sizes, **options)
    # All weights of the exits are trained, and the adapter's checkpoints contain them: its base model has none.
    exits = {"exit_projections": encoder.exit_projections, "exit_gates": encoder.exit_gates}
    whole = [f"{name}.{index}" for name, modules in exits.items() for index in range(len(modules or ()))]
    config = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=model_args.lora_target_modules or "all-linear",
        modules_to_save=whole or None,
        exclude_modules=whole or None,
    )
    return get_peft_model(encoder, config)


def _check_batches(args: TwoDMSETrainingArguments, rows: int) -> None:
    batch = args.per_device_train_batch_size
    if rows < batch:
        raise ValueError(
            f"train_file: {'one row is' if rows == 1 else f'{rows} rows are'} fewer than one batch of {batch}; "
            "add rows or lower --per_device_train_batch_size"
        )


def _command(script: str) -> str:
    """The command line of this run, without the folders of this machine and without secrets."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join([f"accelerate launch run_scripts/{script}.py", *(shlex.quote(secrets.hide(w)) for w in words)])
