"""Embed a corpus at one size or several from one pass: `accelerate launch run_scripts/encode.py --input F ...`."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.reading import STDIN, Malformed, Text, check_format, count_lines, read_texts
from retrieval.shards import FORMATS, Corpus, Store, check_settings, encode_shards, finish, is_ours, make_shards
from run_scripts.evaluate import choose_sizes
from run_scripts.shared import checks, cli, remote_code
from trainer.shared.headings import check_heading
from twodmse import __version__

if TYPE_CHECKING:
    from modeling_2dmse import Size, TwoDMSEModel

ENGINES = ("local", "ray")


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
    part: str = field(
        default="1/1",
        metadata={"help": "Part of the shards to make, for array jobs: 3/64 is the third of 64. All parts have the "
                  "same output_dir; the one that ends last completes it."},
    )  # fmt: skip
    engine: str = field(
        default="local",
        metadata={"help": "local, or ray for a worker per GPU or core, here or on a cluster (the extra ray)."},
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Ray cluster: HOST:PORT or auto. Default: Ray is started on this machine."}
    )
    ray_cpus: int | None = field(
        default=None, metadata={"help": "Cores of each Ray worker where there are no GPUs. Default: 1."}
    )
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, check, embed shard by shard."""
    with cli.user_errors():
        (args,) = cli.Parser((EncodeArguments,)).parse(argv)
        check(args)
        texts = read_texts(args.input, args.text_column, args.id_column)
        checks.check_model(args.model_name_or_path)

        import torch
        from accelerate import PartialState

        from run_scripts.shared import output, runs

        runs.use_all_cores()
        state = PartialState(cpu=not torch.accelerator.is_available())  # else processes on CPUs do not find each other
        _check_processes(args, state.num_processes)
        encoder = Encoder(args, "cpu" if args.engine == "ray" else state.device)
        folder = Path(args.output_dir)
        with state.main_process_first():
            check_settings(folder, encoder.settings)
        part, parts = checks.parse_part(args.part)
        # The processes of a part share its shards: every `parts`-th one.
        share = (part + parts * state.process_index, parts * state.num_processes)
        progress = Progress(args.input, share[1])
        started = time.perf_counter()
        corpus = encode_corpus(args, encoder, texts, share, progress)
        progress.bar.close()
        if not corpus.rows:
            raise ValueError(f"input: {args.input} has no texts")
        state.wait_for_everyone()
        if state.is_main_process:
            complete(folder, encoder.settings, corpus, parts)
    for line, reason in corpus.skipped:
        output.say(f"line {line} was left out: {reason}")
    if corpus.empty:
        output.say(f"{corpus.empty} of the texts are empty; each has the embedding of a text without words")
    seconds = time.perf_counter() - started
    shards = "1 shard" if len(corpus.keys) == 1 else f"{len(corpus.keys)} shards"
    output.say(
        f"{corpus.rows} texts in {shards}, {len(corpus.skipped)} lines left out; "
        f"{progress.new} encoded here in {seconds:.1f} s ({progress.new / seconds:.0f} texts/s); written to {folder}"
    )


class Encoder:
    """A model and what of it is stored.

    Args:
        args: of the script.
        device: for the model.

    Attributes:
        settings: what must be the same for shards to belong together.

    Raises:
        ValueError: the model cannot be loaded, or an argument does not fit it.
    """

    def __init__(self, args: EncodeArguments, device):
        from modeling_2dmse import Size
        from modeling_2dmse.formats import check_precision
        from run_scripts.shared import models

        model = models.load_encoder(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        models.check_max_length(model, args.max_length)
        self.args, self.model = args, model.to(device)
        self.sizes = choose_sizes(model, args.sizes) if args.sizes else [Size(model.num_layers, model.config.dim)]
        self.prompt = model.find_prompt(name=args.prompt_name)
        check_precision(args.precision, model.config.similarity)
        self.settings = describe(args, model, self.sizes, self.prompt)

    def __call__(self, texts: list[str], progress=None) -> dict:
        """See `embed`."""
        return embed(self.model, texts, self.sizes, self.prompt, self.args, progress)


def encode_corpus(
    args: EncodeArguments,
    encoder: Encoder,
    texts: Iterable[Text | Malformed],
    share: tuple[int, int],
    progress: Progress,
) -> Corpus:
    """Make the shards of this process, here or by Ray's workers; `share` is its number and the number of processes."""
    folder, sizes = Path(args.output_dir), encoder.settings["sizes"]
    options = (*share, args.on_error, progress)
    if args.engine == "local":
        embed_here = partial(encoder, progress=progress.bar.update)
        return encode_shards(texts, embed_here, folder, sizes, args.shard_size, args.format, *options)
    from run_scripts.encoding.cluster import Workers

    with Workers(args, encoder.settings, progress) as workers:
        corpus = make_shards(texts, workers.make, Store(folder, sizes, args.format), args.shard_size, *options)
        workers.wait()
    return corpus


def complete(folder: Path, settings: dict, corpus: Corpus, parts: int) -> None:
    """Write the summary of the folder, unless shards of other parts are missing, which is said."""
    from run_scripts.shared import output

    missing = Store(folder, settings["sizes"], settings["format"]).find_missing(corpus.keys)
    if not missing:
        finish(folder, settings, corpus)
        return
    state = f"{len(missing)} of {len(corpus.keys)} shards are not in {folder}"
    if parts == 1:
        raise ValueError(f"output_dir: {state}; name a folder that all workers share, and run the command again")
    names = sorted({number % parts + 1 for number in missing})
    listed = ", ".join(f"{name}/{parts}" for name in names[:10]) + (", ..." if len(names) > 10 else "")
    output.say(f"{state} yet, of --part {listed}; the part that ends last, or any part that is run again, completes it")


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
    for name, allowed in (("format", FORMATS), ("precision", checks.PRECISIONS), ("on_error", ("stop", "skip")),
                          ("engine", ENGINES)):  # fmt: skip
        checks.check_choice(name, getattr(args, name), allowed)
    for name in ("batch_size", "shard_size", "max_length", "ray_cpus"):
        checks.check_at_least(name, getattr(args, name), 1)
    checks.parse_part(args.part)
    _check_ray(args)
    checks.check_no_file(args.output_dir)
    if not is_ours(Path(args.output_dir)):
        raise ValueError(f"output_dir: {args.output_dir} holds something else; choose another folder")
    if args.sizes:
        checks.check_chosen_sizes(args.sizes, args.model_name_or_path)
    if args.input == STDIN or os.path.isfile(args.input):
        check_format(args.input, args.text_column)
    if os.path.isfile(args.input):
        check_heading(args.input, "input")


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


def _check_ray(args: EncodeArguments) -> None:
    if args.engine != "ray":
        for name in ("ray_address", "ray_cpus"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}: only --engine ray has it")
        return
    if importlib.util.find_spec("ray") is None:
        raise ValueError('engine: Ray is missing; pip install "twodmse[ray]"')
    if args.ray_address is not None:
        from run_scripts.encoding.cluster import check_address

        check_address(args.ray_address)


def _check_processes(args: EncodeArguments, processes: int) -> None:
    """ValueError for what only one process can do."""
    if processes > 1 and args.engine == "ray":
        raise ValueError("engine: ray starts its own workers; start encode.py as a single process")
    if processes > 1 and args.input == STDIN:
        raise ValueError("input: only one process can read standard input; start encode.py as a single process")


if __name__ == "__main__":
    main()
