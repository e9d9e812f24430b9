"""Publishing a model folder on the Hub."""

import fnmatch
import json
import os
import shutil
import stat

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

# In the snippets of a card, the owner of a model that is not on the Hub yet.
OWNER = "your-name"
# Files of a training run that users of the model do not need.
LEFT_OUT = ("checkpoint-*", "runs", "*.partial", "training_args.bin", "_*", ".*", "*.log")


def check_model_folder(folder: str) -> None:
    """ValueError unless the folder contains a complete elastic model: configuration, weights, tokenizer and code."""
    if not os.path.isdir(folder):
        raise ValueError(f"model_name_or_path: {folder} is not a folder")
    needed = ("config.json", "model.safetensors", "tokenizer.json", "modeling_2dmse.py", "modules.json")
    names = os.listdir(folder)
    sharded = "model.safetensors.index.json" in names
    missing = [name for name in needed if name not in names and not (sharded and name == "model.safetensors")]
    if missing:
        raise ValueError(f"model_name_or_path: {folder} is not a saved elastic model: {', '.join(missing)} is missing")


def check_repo_id(repo_id: str) -> None:
    """ValueError unless the Hub accepts the name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id: {repo_id!r} is not a valid Hub name; use the form owner/name") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: {repo_id!r} is not a valid Hub name; use the form owner/name")


def find_token(token: str | None) -> str:
    """The given token, or else the one of the environment or of `hf auth login`."""
    token = token or get_token()
    if not token:
        raise ValueError("token: there is none; run `hf auth login`, or set HF_TOKEN to a token with write access")
    return token


def stage(folder: str, repo_id: str, target: str) -> list[str]:
    """Copy the files to upload, with the Hub name in the model card.

    Args:
        folder: a model folder.
        repo_id: the Hub name.
        target: a folder that is empty or does not exist, and is not inside `folder`.

    Returns:
        the paths of the files inside `target`, sorted.

    Raises:
        ValueError: `target` is not allowed, or `folder` has a link that leads out of it, a link to a folder, or
            something that is neither a file nor a folder.
    """
    check_target(target, folder)
    _check_real(folder)
    card = _renamed_card(folder, repo_id) if os.path.isfile(os.path.join(folder, "README.md")) else None
    shutil.copytree(folder, target, ignore=_ignore, dirs_exist_ok=True)
    if card is not None:
        card.save(os.path.join(target, "README.md"))
    found = [os.path.join(root, name) for root, _, names in os.walk(target) for name in names]
    return sorted(os.path.relpath(path, target) for path in found)


def _renamed_card(folder: str, repo_id: str) -> ModelCard:
    """The card of a model folder with the Hub name instead of its name; ValueError if its head is damaged."""
    try:
        card = ModelCard.load(os.path.join(folder, "README.md"))
        old = (card.data.to_dict().get("model-index") or [{"name": None}])[0]["name"] or _title(card.text)
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name_or_path: the head of {folder}/README.md is not YAML: {reason}") from error
    if old:
        for quoted in (f'"{old}"', f'"{OWNER}/{old}"'):
            card.content = card.content.replace(quoted, f'"{repo_id}"')
        card.content = card.content.replace(f"# {old}\n", f"# {repo_id}\n")
        card.content = card.content.replace(f"- name: {old}\n", f"- name: {repo_id}\n")
    return card


def check_target(target: str, folder: str | None = None) -> None:
    """ValueError if the folder to write to has files already, or is inside `folder`, which is copied into it."""
    if os.path.isdir(target) and os.listdir(target):
        raise ValueError(f"dry_run: {target} is not empty; choose another folder")
    if folder is not None and _is_inside(target, folder):
        raise ValueError(f"dry_run: {target} is inside {folder}, which is copied; choose another folder")


def upload(folder: str, repo_id: str, token: str, private: bool, revision: str | None) -> str:
    """Upload a staged folder in one commit, after creating the repository and the branch if they do not exist.

    Returns:
        the URL of the commit.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        depth = json.load(file)["num_layers"]
    message = f"Upload an elastic encoder of {depth} layers"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message).commit_url


def upload_space(folder: str, repo_id: str, token: str, private: bool, revision: str | None) -> str:
    """As `upload`, for the folder of a Space (see `run_scripts/demonstration/space.py`)."""
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type="space", exist_ok=True)
    message = "Upload the demo of an elastic encoder"
    return api.upload_folder(
        repo_id=repo_id, repo_type="space", folder_path=folder, revision=revision, commit_message=message
    ).commit_url


def _check_real(folder: str) -> None:
    """ValueError for what would be uploaded and is not the folder's own: a link could name any file of this machine."""
    for root, folders, files in os.walk(folder):
        left_out = _ignore(root, [*folders, *files])
        folders[:] = [name for name in folders if name not in left_out]
        for name in [*folders, *files]:
            path = os.path.join(root, name)
            if name in left_out:
                continue
            if os.path.islink(path) and (not os.path.isfile(path) or not _is_inside(path, folder)):
                raise ValueError(
                    f"model_name_or_path: {path} is a link to {os.readlink(path)}; put the file itself there"
                )
            if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
                raise ValueError(f"model_name_or_path: {path} is not a file; remove it")


def _is_inside(path: str, folder: str) -> bool:
    """Whether what a path leads to is a folder or something in it."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def _title(text: str) -> str | None:
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    return lines[0] if lines else None


def _ignore(_, names: list[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)}
