"""Add hard negatives to pairs, mined with a model at a cheap size: `python run_scripts/mine_negatives.py
--model_name_or_path M --train_file pairs.csv --size 2x64 --output_file triplets.csv.gz`."""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, remote_code, screen
from trainer.selection import NegativeSelection

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from modeling_2dmse import Size, TwoDMSEModel
    from trainer.mining import MiningTask

FORMATS = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass
class MiningArguments:
    """What is mined from what, and with which model."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    output_file: str = field(
        metadata={"help": f"Table (anchor, positive, negative, negative_1, ...) to write: {', '.join(FORMATS)}."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Table (anchor, positive): csv, tsv, jsonl, parquet, also .gz."}
    )
    corpus_file: str | None = field(
        default=None,
        metadata={"help": "Source of the negatives: a table with a column text, or a corpus.jsonl of BEIR. Default: "
                  "the positives of the table."},
    )  # fmt: skip
    beir_dir: str | None = field(
        default=None, metadata={"help": "Folder in BEIR layout, instead of a table: one row per relevant document."}
    )
    beir_split: str = field(
        default="train",
        metadata={
            "help": "Split of the qrels to make rows of; what is relevant in another split is no negative either."
        },
    )
    size: str | None = field(
        default=None, metadata={"help": "LAYERSxDIM to encode and search with. Default: the smallest of the ladder."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Most texts per batch. Default: as many tokens as suit the device."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest text in tokens. Default: the model's."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an output file that exists."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, read, encode, mine, write."""
    with cli.user_errors():
        args, selection = cli.Parser((MiningArguments, NegativeSelection)).parse(argv)
        check(args)

        from run_scripts.shared import models
        from trainer.mining import embed, mine

        task = read_task(args, selection)
        model = models.to_device(models.load_encoder(args.model_name_or_path, trust_remote_code=args.trust_remote_code))
        models.check_max_length(model, args.max_length)
        size = choose_size(model, args.size)
        check_filters(selection, model)
        os.makedirs(os.path.dirname(os.path.abspath(args.output_file)), exist_ok=True)
    print(f"{len(task.rows)} rows, {len(task.anchors)} anchors, {task.num_documents} documents; at {size}", flush=True)
    started = time.perf_counter()
    anchors, texts = (
        embed(
            model,
            part,
            size,
            model.config.prompts.get(role, ""),
            batch_size=args.batch_size,
            max_length=args.max_length,
        )
        for part, role in ((task.anchors, "query"), (task.texts, "document"))
    )
    negatives = mine(task, anchors, texts, selection)
    with cli.user_errors():
        table = build_table(task, negatives, selection)
        write_table(table, args.output_file)
    print(f"{len(task.rows) - len(table)} rows dropped, with fewer than {selection.num_negatives} left ({selection})")
    print(f"{len(table)} rows in {time.perf_counter() - started:.1f} s; written to {args.output_file}")


def check(args: MiningArguments) -> None:
    """ValueError for a flag that is not allowed."""
    cli.exactly_one(args, "train_file", "beir_dir", "the pairs")
    if args.size is not None:
        checks.check_sizes([args.size], "size", args.model_name_or_path)
    if args.beir_dir is not None and args.corpus_file is not None:
        raise ValueError("corpus_file: the folder of --beir_dir has its own corpus; leave one of the two out")
    if not args.output_file.lower().endswith(FORMATS):
        raise ValueError(f"output_file: {args.output_file} has an unknown format; use one of {', '.join(FORMATS)}")
    if os.path.isdir(args.output_file):
        raise ValueError(f"output_file: {args.output_file} is a folder")
    if os.path.exists(args.output_file) and not args.overwrite:
        raise ValueError(f"output_file: {args.output_file} exists; choose another or pass --overwrite true")
    read = [("train_file", args.train_file), ("corpus_file", args.corpus_file)]
    if args.beir_dir is not None:
        read += [("beir_dir", os.path.join(args.beir_dir, name)) for name in ("corpus.jsonl", "queries.jsonl")]
    for argument, path in read:
        if path is not None and os.path.realpath(path) == os.path.realpath(args.output_file):
            raise ValueError(f"output_file: {args.output_file} is read as {argument} and not replaced; choose another")
    for name in ("batch_size", "max_length"):
        checks.check_at_least(name, getattr(args, name), 1)
    for name in ("train_file", "corpus_file"):
        checks.check_files(name, getattr(args, name))
    if args.beir_dir is not None:
        checks.check_beir_dirs("beir_dir", [args.beir_dir], args.beir_split)
    checks.check_model(args.model_name_or_path)


def read_task(args: MiningArguments, selection: NegativeSelection) -> MiningTask:
    """The rows and the corpus that the arguments name; ValueError if no row can get enough negatives."""
    from trainer.data import check_table
    from trainer.mining import prepare, read_beir, read_documents
    from trainer.shared.tables import read_table

    if args.beir_dir is not None:
        with named("beir_dir"):
            pairs, corpus, known = read_beir(args.beir_dir, args.beir_split)
        if not pairs:
            raise ValueError(f"beir_dir: {args.beir_dir} has no relevant document in its split {args.beir_split}")
    else:
        table = check_table(read_table(args.train_file))
        if "score" in table.column_names:
            raise ValueError(f"train_file: {args.train_file} needs the columns (anchor, positive)")
        pairs, known = list(zip(table["anchor"][:], table["positive"][:], strict=True)), []
        corpus = read_documents(args.corpus_file) if args.corpus_file else [positive for _, positive in pairs]
    task = prepare(pairs, corpus, known)
    if task.num_documents < selection.range_min + selection.num_negatives:
        raise ValueError(
            f"range_min: skipping {selection.range_min} ranks leaves fewer than {selection.num_negatives} of the "
            f"corpus, which has {task.num_documents} documents; lower --range_min or name a --corpus_file"
        )
    return task


def choose_size(model: TwoDMSEModel, text: str | None) -> Size:
    """The size of `--size`, by default the smallest of the model's ladder."""
    from modeling_2dmse import parse_ladder

    if text is None:
        return model.config.ladder[0]
    with named("size"):
        return parse_ladder([text], model.num_layers, model.config.hidden_size)[0]


def check_filters(selection: NegativeSelection, model: TwoDMSEModel) -> None:
    """ValueError for a filter of cosines if the model compares embeddings by dot product."""
    for name in ("margin", "max_score"):
        if model.config.similarity == "dot" and getattr(selection, name) is not None:
            raise ValueError(
                f"{name}: it limits cosines, but the model compares embeddings by dot product; use relative_margin"
            )


@contextlib.contextmanager
def named(argument: str):
    """Around a function whose errors name another argument or none: they name this argument instead."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"^(\w+: )?", f"{argument}: ", str(error))) from error


def build_table(task: MiningTask, negatives: torch.Tensor, selection: NegativeSelection) -> Dataset:
    """The rows that got their negatives, as a training table; ValueError if there are none."""
    from datasets import Dataset

    kept = negatives[:, 0] >= 0
    if not kept.any():
        raise ValueError(
            f"filters: no row has {selection.num_negatives} negatives left with {selection}; widen one of them"
        )
    anchors, positives = task.rows[kept].T.tolist()
    columns = {"anchor": [task.anchors[i] for i in anchors], "positive": [task.texts[i] for i in positives]}
    for place, numbers in enumerate(negatives[kept].T.tolist()):
        columns["negative" if place == 0 else f"negative_{place}"] = [task.texts[i] for i in numbers]
    return Dataset.from_dict(columns)


def write_table(table: Dataset, path: str) -> None:
    """Write atomically: a reader sees the old file or the complete new one. The same table gives the same bytes."""
    from datasets import config

    partial, name = f"{path}.partial", path.lower()
    one_step = name.endswith(".parquet") or len(table) <= config.DEFAULT_MAX_BATCH_SIZE
    try:
        with open(partial, "wb") as raw:
            is_packed = name.endswith(".gz")
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_packed else contextlib.nullcontext(raw)
            with packed as file, screen.without_bars(one_step):
                if name.endswith(".parquet"):
                    table.to_parquet(file)
                elif name.endswith((".jsonl", ".jsonl.gz")):
                    table.to_json(file, force_ascii=False)
                else:  # all are quoted: a bare carriage return in a text would end its row
                    table.to_csv(file, index=False, quoting=csv.QUOTE_ALL)
        os.replace(partial, path)
    finally:  # of a full disk, for example
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


if __name__ == "__main__":
    main()
