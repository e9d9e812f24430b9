"""Publish a model folder: `python run_scripts/push_to_hub.py --model_name_or_path OUT --repo_id owner/name`."""

import tempfile
from dataclasses import dataclass, field

from huggingface_hub.errors import HfHubHTTPError

from run_scripts.shared import cli
from trainer.shared.hub import check_loads, check_model_folder, check_repo_id, find_token, stage, upload


@dataclass
class PushArguments:
    """What is published where."""

    model_name_or_path: str = field(metadata={"help": "Folder of a saved elastic model."})
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


def main(argv=None) -> None:
    """Parse, check, stage, upload."""
    with cli.user_errors():
        (args,) = cli.Parser((PushArguments,)).parse(argv)
        check_model_folder(args.model_name_or_path)
        check_repo_id(args.repo_id)
        check_loads(args.model_name_or_path)
        if args.dry_run is not None and args.dry_run.lower() != "false":
            show(args)
            return
        token = find_token(args.token)
    with tempfile.TemporaryDirectory() as folder, cli.user_errors():
        files = stage(args.model_name_or_path, args.repo_id, folder)
        try:
            address = upload(folder, args.repo_id, token, args.private, args.revision)
        except HfHubHTTPError as error:
            raise ValueError(f"repo_id: the Hub refused: {error}") from error
    print(f"{len(files)} files: {address}")


def show(args: PushArguments) -> None:
    """List the files that would be uploaded; `dry_run` is the folder that gets them, or `true`."""
    with tempfile.TemporaryDirectory() as folder:
        target = folder if str(args.dry_run).lower() == "true" else str(args.dry_run)
        files = stage(args.model_name_or_path, args.repo_id, target)
    print("\n".join(files))
    written = "" if target == folder else f", written to {target}"
    print(f"{len(files)} files{written}; nothing was uploaded")


if __name__ == "__main__":
    main()
