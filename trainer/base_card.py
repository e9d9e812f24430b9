"""What the card of a backbone says about it: its published ancestor, its licence and its languages."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from huggingface_hub import ModelCard
from transformers.utils import cached_file


@dataclass(frozen=True)
class BaseFacts:
    """Facts for the card of a model that is trained from a backbone.

    Args:
        base_model: Hub name of the nearest published model, None if it is unknown.
        license: its licence, as an identifier of the Hub.
        languages: its languages, as codes.
    """

    base_model: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()


def read_base_facts(name_or_path: str, is_local: bool) -> BaseFacts:
    """The facts in the README.md of a folder or a Hub repository; of a folder, `base_model` is what its card names."""
    own_name = None if is_local else name_or_path
    options = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{name}": False for name in options}
    try:
        path = cached_file(name_or_path, "README.md", **quiet)
        data = ModelCard.load(path).data.to_dict() if path else {}
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError):  # a card that cannot be read has no facts
        data = {}
    found, license, languages = data.get("base_model"), data.get("license"), data.get("language") or []
    found = found[0] if isinstance(found, list) and found else found
    languages = [languages] if isinstance(languages, str) else languages
    return BaseFacts(
        own_name or (found if isinstance(found, str) else None),
        license if isinstance(license, str) else None,
        tuple(language for language in languages if isinstance(language, str)),
    )


def card_facts(
    source: str | None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
) -> dict[str, object]:
    """The fields of `model_card.Run` that are facts of the backbone: those given, and else those of its own card.

    Args:
        source: folder or Hub name that the model was loaded from, if any.
        base_model: Hub name of the backbone.
        license: licence of the model.
        language: one or several codes of languages.
    """
    found = BaseFacts()
    if source:
        found = read_base_facts(source, is_local=os.path.isabs(source) or os.path.exists(source))
    given = [language] if isinstance(language, str) else language
    return {
        "base_model": base_model or found.base_model,
        "license": license or found.license,
        "languages": tuple(given or found.languages),
    }
