"""Griffe extension for the API page: doctests become code blocks, and transformers' [`Name`] becomes code."""

import re

import griffe

# A doctest up to the next blank line, with its indentation.
_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)
_REFERENCE = re.compile(r"\[(`[^`\]]+`)\](?!\()")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called for each object whose source is read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring, as the Markdown that MkDocs shows.

    >>> as_markdown("[`Size`]")
    '`Size`'
    """

    def fence(match: re.Match) -> str:
        lines = [f"{match['indent']}```python", match[0], f"{match['indent']}```"]
        return "\n".join(lines)

    return _REFERENCE.sub(r"\1", _DOCTEST.sub(fence, text))
