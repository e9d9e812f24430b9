"""The flags of an engine, which build_index.py and search.py share, and the engine that they name."""

import os
import re
import shlex
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import yaml

from retrieval.engines import ENGINES, Engine, open_engine
from run_scripts.shared import checks, secrets


@dataclass
class EngineArguments:
    """Where an index is kept."""

    engine: str = field(
        default="local",
        metadata={"help": f"{', '.join(ENGINES)}. The extras of the last two have their clients."},
    )
    engine_url: str = field(
        default="",
        metadata={"help": "URL of a Qdrant server. Default: the client's local mode, in the index's folder."},
    )
    engine_api_key_env: str | None = field(
        default=None, metadata={"help": "Name of the environment variable that has Qdrant's API key."}
    )
    engine_url_env: str = field(
        default="DATABASE_URL",
        metadata={"help": "Name of the environment variable that has the URL of the PostgreSQL database."},
    )

    def has_server(self) -> bool:
        """Whether an index is named by a collection or table instead of a folder."""
        return self.engine == "pgvector" or bool(self.engine_url)

    def flags(self) -> str:
        """What a command for the same index needs, as it is typed."""
        given = [(name, value) for name, value in vars(self).items() if value != getattr(EngineArguments, name)]
        return "".join(f" --{name} {shlex.quote(value)}" for name, value in given)

    def check(self) -> None:
        """ValueError for flags that do not go together; needs no client."""
        checks.check_choice("engine", self.engine, ENGINES)
        if self.engine != "qdrant" and self.engine_url:
            raise ValueError(f"engine_url: {self.engine} has no URL here; only qdrant has")
        if self.engine_api_key_env is not None and not self.engine_url:
            raise ValueError("engine_api_key_env: only a Qdrant server needs a key; name it by --engine_url")
        if self.engine_url:
            _check_url(self.engine_url)

    def open(self, place: str, options: str | None = None) -> Engine:
        """The engine, with an index in a folder or of a name.

        Args:
            place: folder, collection or table.
            options: of Qdrant's collection, as JSON or YAML.
        """
        self.check()
        if self.has_server() and re.search("[\ud800-\udfff]", place):
            raise ValueError(f"collection: {place!r} is not valid Unicode")
        settings = _parse_options(options)
        if settings and not self.engine_url:
            raise ValueError("engine_options: only a Qdrant server has options; name it by --engine_url")
        key = _variable("engine_api_key_env", self.engine_api_key_env)
        url = _variable("engine_url_env", self.engine_url_env) if self.engine == "pgvector" else self.engine_url
        return open_engine(self.engine, place, url or "", key, settings)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, is_url = None, False
    if parts is None or not is_url:
        raise ValueError(f"engine_url: {url!r} is not a URL; write for example http://localhost:6333")
    if parts.username or parts.password or parts.query or parts.fragment:  # it is shown in messages
        raise ValueError("engine_url: a user, password or query is not allowed in it; name the key's variable instead")
    try:
        cast(str, parts.hostname).encode("idna")
    except UnicodeError as error:
        raise ValueError(f"engine_url: {url!r} has a host that is not allowed: {error}") from error


def _variable(flag: str, name: str | None) -> str | None:
    """The value of an environment variable, which is hidden in everything that is printed."""
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"{flag}: the environment variable {name[:80]!r} is not set")
    secrets.note(value)
    return value


def _parse_options(text: str | None) -> dict:
    if text is None:
        return {}
    try:
        options = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError("engine_options: this is not JSON or YAML; write for example '{shard_number: 4}'") from error
    if not isinstance(options, dict):
        raise ValueError(f"engine_options: {options!r} is not allowed; write for example '{{shard_number: 4}}'")
    return options
