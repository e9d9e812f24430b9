"""Embed a corpus at one size or several from one pass: `accelerate launch run_scripts/encode.py --input F ...`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.reading import STDIN, count_lines, read_texts
from retrieval.shards import FORMATS, SETTINGS, check_settings, encode_shards, finish
from run_scripts.evaluate import choose_sizes
from run_scripts.shared import checks, cli, remote_code
from twodmse import __version__

if TYPE_CHECKING:
    from modeling_2dmse import Size, TwoDMSEModel


@dataclass
class EncodeArguments:
    """What is embedded, and how."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    input: str = field(
        metadata={"help": "Texts: .txt (one per line), csv, tsv, jsonl, parquet, all but parquet also .gz; a folder in "
                  "BEIR layout; - for standard input."}
    )  # fmt: skip
    output_dir: str = field(
        metadata={"help": "Folder for the embeddings; when run again, encode.py completes what is there."}
    )
    sizes: list[str] | None = field(
        default=None, metadata={"help": "LAYERSxDIM ..., ladder or grid. Default: the model's full size."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of a table that has the texts."})
    id_column: str | None = field(
        default=None, metadata={"help": "Column of the ids. Default: _id or id, else the row's number."}
    )
    format: str = field(default="npy", metadata={"help": f"Format of the shards: {', '.join(FORMATS)}."})
    precision: str = field(
        default="float32", metadata={"help": f"Precision of the embeddings: {', '.join(checks.PRECISIONS)}."}
    )
    shard_size: int = field(default=4096, metadata={"help": "Texts per shard."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Most texts per batch. Default: as many tokens as suit the device."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest text in tokens. Default: the model's."})
    prompt_name: str | None = field(default=None, metadata={"help": "The model's prompt to put before each text."})
    on_error: str = field(default="stop", metadata={"help": "What to do at a malformed line: stop or skip."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, check, embed shard by shard."""
    with cli.user_errors():
        (args,) = cli.Parser((EncodeArguments,)).parse(argv)
        check(args)
        texts = read_texts(args.input, args.text_column, args.id_column)

        import torch
        from accelerate import PartialState

        from modeling_2dmse import Size
        from modeling_2dmse.formats import check_precision
        from run_scripts.shared import models, output, runs

        runs.use_all_cores()
        state = PartialState(cpu=not torch.accelerator.is_available())  # else processes on CPUs do not find each other
        if args.input == STDIN and state.num_processes > 1:
            raise ValueError("input: only one process can read standard input; start encode.py as a single process")
        model = models.load_encoder(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        models.check_max_length(model, args.max_length)
        model = model.to(state.device)
        sizes = choose_sizes(model, args.sizes) if args.sizes else [Size(model.num_layers, model.config.dim)]
        prompt = model.find_prompt(name=args.prompt_name)
        check_precision(args.precision, model.config.similarity)
        folder, settings = Path(args.output_dir), describe(args, model, sizes, prompt)
        with state.main_process_first():
            check_settings(folder, settings)
        progress = Progress(args.input, state.num_processes)
        started = time.perf_counter()
        summary = encode_shards(
            texts,
            lambda batch: embed(model, batch, sizes, prompt, args, progress.bar.update),
            folder,
            settings["sizes"],
            args.shard_size,
            args.format,
            state.process_index,
            state.num_processes,
            args.on_error,
            progress,
        )
        progress.bar.close()
        if not summary["rows"]:
            raise ValueError(f"input: {args.input} has no texts")
        state.wait_for_everyone()
        if state.is_main_process:
            finish(folder, settings, summary)
    for line, reason in summary["skipped"]:
        output.say(f"line {line} was left out: {reason}")
    if summary["empty"]:
        output.say(f"{summary['empty']} of the texts are empty; each has the embedding of a text without words")
    seconds = time.perf_counter() - started
    output.say(
        f"{summary['rows']} texts in {summary['shards']} shards, {len(summary['skipped'])} lines left out; "
        f"{progress.new} encoded here in {seconds:.1f} s ({progress.new / seconds:.0f} texts/s); written to {folder}"
    )


class Progress:
    """
    The bar of this process's share of the texts, which moves with every batch, and the texts that it has encoded.

    Args:
        path: the file of texts.
        processes: how many processes share it.
    """

    def __init__(self, path: str, processes: int):
        from accelerate.utils import tqdm

        total = count_lines(path)
        share = None if total is None else -(-total // processes)
        hidden = not sys.stderr.isatty()  # in a log, it would be more lines before an error
        self.bar = tqdm(main_process_only=True, total=share, unit="text", desc="Encoding", disable=hidden)
        self.new = 0

    def __call__(self, rows: int, is_new: bool) -> None:
        """A shard is finished; if it was encoded now, its batches have moved the bar."""
        if is_new:
            self.new += rows
        else:
            self.bar.update(rows)


def check(args: EncodeArguments) -> None:
    """ValueError for a flag that is not allowed."""
    for name, allowed in (("format", FORMATS), ("precision", checks.PRECISIONS), ("on_error", ("stop", "skip"))):
        checks.check_choice(name, getattr(args, name), allowed)
    for name in ("batch_size", "shard_size", "max_length"):
        checks.check_at_least(name, getattr(args, name), 1)
    checks.check_at_least("max_length", args.max_length, 1)
    checks.check_no_file(args.output_dir)
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir) and not _is_ours(args.output_dir):
        raise ValueError(f"output_dir: {args.output_dir} holds something else; choose another folder")
    if args.sizes:
        checks.check_chosen_sizes(args.sizes)
    checks.check_model(args.model_name_or_path)


def describe(args: EncodeArguments, model: TwoDMSEModel, sizes: list[Size], prompt: str) -> dict:
    """What must be the same for shards to belong together."""
    from run_scripts.shared import models

    names = ("model_name_or_path", "input", "text_column", "id_column", "format", "precision", "shard_size")
    settings = {name: getattr(args, name) for name in names}
    settings |= models.describe(model) | {"sizes": list(map(str, sizes)), "prompt": prompt}
    if model.config.similarity != "cosine":
        settings["similarity"] = model.config.similarity
    return settings | {"max_length": args.max_length or model.max_length, "version": __version__}


def embed(
    model: TwoDMSEModel, texts: list[str], sizes: list[Size], prompt: str, args: EncodeArguments, progress=None
) -> dict:
    """{size: (len(texts), dim) array in the precision asked for}, from one pass; see `encode_states` for `progress`."""
    from modeling_2dmse.encoding import to_embeddings
    from modeling_2dmse.formats import quantize

    layers, similarity = sorted({size.num_layers for size in sizes}), model.config.similarity
    states = model.encode_states(texts, layers, args.batch_size, prompt, args.max_length, False, progress)
    exits = dict(zip(layers, states, strict=True))
    return {
        str(size): quantize(to_embeddings(exits[size.num_layers], size.dim, similarity), args.precision).numpy()
        for size in sizes
    }


def _is_ours(folder: str) -> bool:
    """Whether encode.py has written the folder; one that was killed at once has left an unfinished file at most."""
    return os.path.isfile(os.path.join(folder, SETTINGS)) or os.listdir(folder) == [f".{SETTINGS}"]


if __name__ == "__main__":
    main()
