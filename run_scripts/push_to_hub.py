"""Publish a model folder: `python run_scripts/push_to_hub.py --model_name_or_path OUT --repo_id owner/name`."""

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from run_scripts.demo import CorpusArguments, check_corpus, offered, read_documents
from run_scripts.shared import checks, cli, output, remote_code
from trainer.shared import hub


@dataclass
class PushArguments:
    """What is published where."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of a saved elastic model; with --space, also one on the Hub."}
    )
    repo_id: str = field(metadata={"help": "Name on the Hub, owner/name."})
    private: bool = field(default=False, metadata={"help": "Create a private repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; created if it is missing."})
    token: str | None = field(
        default=None, metadata={"help": "Access token. Default: HF_TOKEN, or the token of `hf auth login`."}
    )
    dry_run: str | None = field(
        default=None,
        metadata={"help": "List what would be uploaded, and upload nothing; with a folder, also write it there.",
                  "nargs": "?", "const": "true"},
    )  # fmt: skip
    space: bool = field(
        default=False,
        metadata={"help": "Publish the demo of the model as a Space that searches the documents of --corpus_file. A "
                  "model folder is copied into it; a model on the Hub is loaded when the Space starts."},
    )  # fmt: skip


def main(argv=None) -> None:
    """Parse, check, stage, upload."""
    with cli.user_errors():
        args, corpus = cli.Parser((PushArguments, CorpusArguments)).parse(argv)
        on_hub = args.space and not os.path.isdir(args.model_name_or_path)
        if on_hub:
            checks.check_model(args.model_name_or_path)
        else:
            hub.check_model_folder(args.model_name_or_path)
        hub.check_repo_id(args.repo_id)
        if args.space:
            check_corpus(corpus)
        if not on_hub:
            check_works(args.model_name_or_path)
        if args.dry_run is not None and args.dry_run.lower() != "false":
            show(args, corpus)
            return
        token = hub.find_token(args.token)
    with tempfile.TemporaryDirectory() as folder, cli.user_errors():
        files = stage(args, corpus, folder)
        upload = hub.upload_space if args.space else hub.upload
        try:
            address = upload(folder, args.repo_id, token, args.private, args.revision)
        except HfHubHTTPError as error:
            raise ValueError(f"repo_id: the Hub refused: {error}") from error
    print(f"{len(files)} files: {address}")


def check_works(folder: str) -> None:
    """ValueError unless a model folder works: configuration, weights, tokenizer and the files of sentence-transformers.

    No code of the folder is run.
    """
    from modeling_2dmse.sentence_transformers_import import read_folder
    from run_scripts.shared import models

    try:
        models.load_encoder(folder, trust_remote_code=False)
        with remote_code.named(folder):
            read_folder(folder)
    except ValueError as error:
        reason = str(error).removeprefix(f"model_name_or_path: {folder} does not load: ")
        raise ValueError(f"model_name_or_path: {folder} does not load, so it is not published: {reason}") from error


def show(args: PushArguments, corpus: CorpusArguments) -> None:
    """List the files that would be uploaded; `dry_run` is the folder that gets them, or `true`."""
    target = None if str(args.dry_run).lower() == "true" else str(args.dry_run)
    with _staging(args, target) as folder:
        files = stage(args, corpus, str(folder))
    print("\n".join(files))
    written = "" if target is None else f", written to {target}"
    print(f"{len(files)} files{written}; nothing was uploaded")


def _staging(args: PushArguments, target: str | None) -> contextlib.AbstractContextManager[str | Path]:
    """The folder to write to: a temporary one without a target, and one that becomes the target if that is new."""
    if target is None:
        return tempfile.TemporaryDirectory()
    local = os.path.isdir(args.model_name_or_path)
    hub.check_target(target, args.model_name_or_path if local else None)
    return contextlib.nullcontext(target) if os.path.isdir(target) else output.new_folder(target)


def stage(args: PushArguments, corpus: CorpusArguments, folder: str) -> list[str]:
    """Write what is uploaded to a folder; the paths in it."""
    if not args.space:
        return hub.stage(args.model_name_or_path, args.repo_id, folder)

    from modeling_2dmse import TwoDMSEConfig
    from run_scripts.demonstration.corpus import example_queries
    from run_scripts.demonstration.space import stage_space
    from run_scripts.shared import models

    config = models.read_config(args.model_name_or_path)
    if not isinstance(config, TwoDMSEConfig):
        raise ValueError(f"model_name_or_path: {args.model_name_or_path} is not an elastic model")
    documents, source = read_documents(corpus)
    examples = example_queries(documents, source)
    return stage_space(folder, args.model_name_or_path, offered(config), documents, source, examples)


if __name__ == "__main__":
    main()
