"""Secrets that a command line or the environment contains: they are hidden in everything that a script writes."""

import itertools
import os
import re
from collections.abc import Sequence

HIDDEN = "***"
_NAME = re.compile(r"(^|[_-])(token|secret|passw(or)?d|credentials?|key)([_-]|$)", re.IGNORECASE)
# Tokens of the Hub, and what is between `//` and `@` in a URL: user:password or a token.
_PATTERNS = ((re.compile(r"\bhf_\w{6,}"), HIDDEN), (re.compile(r"(\w://)[^/\s@'\"]+@"), rf"\1{HIDDEN}@"))
_CREDENTIALS = re.compile(r"://([^/\s@'\"]+)@")
# Shorter values, such as "1" or "true", occur everywhere.
_SHORTEST = 6
_known: set[str] = set()


def remember(flags: Sequence[str]) -> None:
    """Note the values of flags whose names speak of a secret, and what is before `@` in URLs; `hide` hides them."""
    for flag, value in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, own = flag.partition("=")
        if flag.startswith("-") and _NAME.search(name):
            note(own if equals else value)
        for credentials in _CREDENTIALS.findall(flag):  # a library may show them in another form than a URL
            if ":" in credentials:
                _known.add(credentials)
            else:
                note(credentials)


def hide(text: str) -> str:
    """A text without secrets: noted values, those of the environment, tokens of the Hub, and user names in URLs."""
    for name, value in os.environ.items():
        if _NAME.search(name):
            note(value)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def note(value: str) -> None:
    """Note a secret; `hide` hides it from now on."""
    # A path or a number is no secret, even in a variable like HF_TOKEN_PATH or a flag like --visual_token_sizes.
    if len(value) >= _SHORTEST and not value.startswith(("-", os.sep)) and not value.isdigit():
        _known.add(value)
