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
        metadata={"help": "Write what would be uploaded to this folder, list it, and upload nothing."},
    )


def main(argv=None) -> None:
    """Parse, check, stage, upload."""
    with cli.user_errors():
        (args,) = cli.Parser((PushArguments,)).parse(argv)
        check_model_folder(args.model_name_or_path)
        check_repo_id(args.repo_id)
        check_loads(args.model_name_or_path)
        if args.dry_run is not None:
            files = stage(args.model_name_or_path, args.repo_id, args.dry_run)
            print("\n".join(files))
            print(f"{len(files)} files, written to {args.dry_run}; nothing was uploaded")
            return
        token = find_token(args.token)
    with tempfile.TemporaryDirectory() as folder, cli.user_errors():
        files = stage(args.model_name_or_path, args.repo_id, folder)
        try:
            address = upload(folder, args.repo_id, token, args.private, args.revision)
        except HfHubHTTPError as error:
            raise ValueError(f"repo_id: the Hub refused: {error}") from error
    print(f"{len(files)} files: {address}")


if __name__ == "__main__":
    main()
