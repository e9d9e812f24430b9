"""Publishing a model folder on the Hub."""

import fnmatch
import json
import os
import shutil

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

# What a training run leaves in its folder that no user of the model needs.
LEFT_OUT = ("checkpoint-*", "runs", "*.partial", "training_args.bin", "_*", ".*", "*.log")


def check_model_folder(folder: str) -> None:
    """ValueError unless the folder holds a whole elastic model: configuration, weights, tokenizer and code."""
    if not os.path.isdir(folder):
        raise ValueError(f"model_name_or_path: {folder} is not a folder")
    needed = ("config.json", "model.safetensors", "tokenizer.json", "modeling_2dmse.py", "modules.json")
    names = os.listdir(folder)
    sharded = "model.safetensors.index.json" in names
    missing = [name for name in needed if name not in names and not (sharded and name == "model.safetensors")]
    if missing:
        raise ValueError(f"model_name_or_path: {folder} is not a saved elastic model: {', '.join(missing)} is missing")


def check_repo_id(repo_id: str) -> None:
    """ValueError unless the name has the form that the Hub takes."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id: {repo_id!r} is not a name of the Hub; write owner/name") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: {repo_id!r} is not a name of the Hub; write owner/name")


def find_token(token: str | None) -> str:
    """The token given, or the one of the environment or of `hf auth login`."""
    token = token or get_token()
    if not token:
        raise ValueError("token: there is none; run `hf auth login` or set HF_TOKEN to one that may write")
    return token


def stage(folder: str, repo_id: str, target: str) -> list[str]:
    """Copy what is to be uploaded, the card with its Hub name in it.

    Args:
        target: an empty or absent folder.

    Returns:
        the files' paths below `target`, sorted.
    """
    if os.path.isdir(target) and os.listdir(target):
        raise ValueError(f"dry_run: {target} is not empty; choose another folder")
    shutil.copytree(folder, target, ignore=_ignore, dirs_exist_ok=True)
    card_path = os.path.join(target, "README.md")
    if os.path.isfile(card_path):
        card = ModelCard.load(card_path)
        old = (card.data.to_dict().get("model-index") or [{"name": None}])[0]["name"] or _title(card.text)
        if old:
            card.content = card.content.replace(f'"{old}"', f'"{repo_id}"').replace(f"# {old}\n", f"# {repo_id}\n")
            card.content = card.content.replace(f"- name: {old}\n", f"- name: {repo_id}\n")
        card.save(card_path)
    found = [os.path.join(root, name) for root, _, names in os.walk(target) for name in names]
    return sorted(os.path.relpath(path, target) for path in found)


def upload(folder: str, repo_id: str, token: str, private: bool, revision: str | None) -> str:
    """Create the repository (and the branch) where it does not exist, and upload a staged folder in one commit.

    Returns:
        the commit's address.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        depth = json.load(file)["num_layers"]
    message = f"Upload an elastic encoder of {depth} layers"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message).commit_url


def _title(text: str) -> str | None:
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    return lines[0] if lines else None


def _ignore(_, names: list[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)}
