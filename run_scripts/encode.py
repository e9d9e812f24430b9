"""Embed a corpus at one size or several from one pass: `accelerate launch run_scripts/encode.py --input F ...`."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import tqdm

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.encoding import PRECISIONS, check_batch_size, quantize
from modeling_2dmse.pooling import cut_and_normalize
from retrieval.reading import STDIN, count_lines, read_texts
from retrieval.shards import FORMATS, check_settings, encode_shards, finish
from run_scripts.evaluate import choose_sizes
from run_scripts.shared import cli, models, output, runs


@dataclass
class EncodeArguments:
    """What is embedded, and how."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    input: str = field(
        metadata={"help": "Texts: .txt (one a line), csv, tsv, jsonl, parquet, all but parquet also .gz; a folder in "
                  "BEIR layout; - for standard input."}
    )  # fmt: skip
    output_dir: str = field(metadata={"help": "Folder for the embeddings; run again, it is completed."})
    sizes: list[str] | None = field(
        default=None, metadata={"help": "LAYERSxDIM ..., ladder or grid. Default: the model's whole size."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of a table that holds the texts."})
    id_column: str | None = field(
        default=None, metadata={"help": "Column of the ids. Default: _id or id, else the row's number."}
    )
    format: str = field(default="npy", metadata={"help": f"Of the shards: {', '.join(FORMATS)}."})
    precision: str = field(default="float32", metadata={"help": f"Of the embeddings: {', '.join(PRECISIONS)}."})
    shard_size: int = field(default=4096, metadata={"help": "Texts a shard."})
    batch_size: int = field(default=32, metadata={"help": "Texts a batch."})
    max_length: int | None = field(default=None, metadata={"help": "Longest text in tokens. Default: the model's."})
    prompt_name: str | None = field(default=None, metadata={"help": "The model's prompt to put in front."})
    on_error: str = field(default="stop", metadata={"help": "At a malformed line: stop or skip."})


def main(argv=None) -> None:
    """Parse, check, embed shard by shard."""
    runs.use_all_cores()
    with cli.user_errors():
        (args,) = cli.Parser((EncodeArguments,)).parse(argv)
        check(args)
        state = PartialState(cpu=not torch.accelerator.is_available())  # else CPUs would not find each other
        if args.input == STDIN and state.num_processes > 1:
            raise ValueError("input: standard input reaches one process alone; start encode.py without the others")
        texts = read_texts(args.input, args.text_column, args.id_column)
        model = models.load_encoder(args.model_name_or_path).to(state.device)
        sizes = choose_sizes(model, args.sizes) if args.sizes else [Size(model.num_layers, model.config.dim)]
        prompt = model.find_prompt(name=args.prompt_name)
        folder, settings = Path(args.output_dir), describe(args, model, sizes)
        with state.main_process_first():
            check_settings(folder, settings)
        total = count_lines(args.input)
        share = None if total is None else -(-total // state.num_processes)
        bar = tqdm(main_process_only=True, total=share, unit="text", desc="Encoding")
        new = 0

        def progress(rows: int, is_new: bool) -> None:
            nonlocal new
            new += rows * is_new
            bar.update(rows)

        def encode(batch: list[str]) -> dict[str, np.ndarray]:
            return embed(model, batch, sizes, prompt, args)

        started = time.perf_counter()
        summary = encode_shards(
            texts,
            encode,
            folder,
            args.shard_size,
            args.format,
            state.process_index,
            state.num_processes,
            args.on_error,
            progress,
        )
        bar.close()
        if not summary["rows"]:
            raise ValueError(f"input: {args.input} holds no text")
        state.wait_for_everyone()
        if state.is_main_process:
            finish(folder, settings, summary)
    for line, reason in summary["skipped"]:
        output.say(f"line {line} was left out: {reason}")
    seconds = time.perf_counter() - started
    output.say(
        f"{summary['rows']} texts in {summary['shards']} shards, {len(summary['skipped'])} lines left out; "
        f"{new} encoded here in {seconds:.1f} s ({new / seconds:.0f} texts/s); written to {folder}"
    )


def check(args: EncodeArguments) -> None:
    """ValueError for a flag that is not allowed."""
    check_batch_size(args.batch_size)
    for name, allowed in (("format", FORMATS), ("precision", PRECISIONS), ("on_error", ("stop", "skip"))):
        if getattr(args, name) not in allowed:
            raise ValueError(f"{name}: {getattr(args, name)!r} is unknown; choose one of {', '.join(allowed)}")
    if args.shard_size < 1:
        raise ValueError(f"shard_size: {args.shard_size} is not allowed; use a whole number from 1")
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir) and not _is_ours(args.output_dir):
        raise ValueError(f"output_dir: {args.output_dir} holds something else; choose another folder")


def describe(args: EncodeArguments, model: TwoDMSEModel, sizes: list[Size]) -> dict:
    """What must be the same for shards to belong together."""
    names = ("model_name_or_path", "input", "text_column", "id_column", "format", "precision", "shard_size")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"weights": models.fingerprint(model), "sizes": list(map(str, sizes)), "prompt_name": args.prompt_name}
    return settings | {"max_length": args.max_length or model.max_length}


def embed(model: TwoDMSEModel, texts: list[str], sizes: list[Size], prompt: str, args: EncodeArguments) -> dict:
    """{size: (len(texts), dim) in the precision asked for}, from one pass."""
    layers = sorted({size.num_layers for size in sizes})
    states = model.encode_states(texts, layers, args.batch_size, prompt, args.max_length, show_progress_bar=False)
    exits = dict(zip(layers, states, strict=True))
    return {
        str(size): quantize(cut_and_normalize(exits[size.num_layers], size.dim), args.precision).numpy()
        for size in sizes
    }


def _is_ours(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "settings.json"))


if __name__ == "__main__":
    main()
