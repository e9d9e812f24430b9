"""The documents and example queries of the demo."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

from retrieval.reading import Malformed, read_texts

from .engine import Document

PYTHON_DOCS = "Python's documentation"
PYTHON_QUERIES = (
    "find the largest items of a list",
    "run a function in another thread",
    "read rows from a spreadsheet file",
    "compress data before sending it",
    "round a number to two decimals",
)
# Words of a docstring that are read, at least and at most; of a text that are its title; of an example query.
_FEWEST, _READ, _TITLE, _QUERY = 8, 60, 6, 10
# Characters of a title or example query, for languages that are written without spaces.
_LONGEST = 80
_Item = TypeVar("_Item")


def python_documents(limit: int) -> list[Document]:
    """Docstrings of the standard library, evenly spaced if there are more than `limit`."""
    from run_scripts.shared.quickstart import standard_docstrings  # needs `datasets`, which takes a moment

    seen: dict[str, Document] = {}
    for name, docstring in standard_docstrings():
        words = docstring.split()
        text = " ".join(words[:_READ])
        if len(words) >= _FEWEST:
            seen.setdefault(text, Document(name, f"{name}: {text}"))
    return spaced(list(seen.values()), limit)


def file_documents(path: str, text_column: str, id_column: str | None, limit: int) -> list[Document]:
    """The first `limit` texts of a file, see `retrieval.reading.read_texts`.

    Raises:
        ValueError: the file cannot be read, or one of these lines has no usable text.
    """
    try:
        texts = list(itertools.islice(_usable(read_texts(path, text_column, id_column)), limit))
    except ValueError as error:
        raise ValueError(str(error).replace("input:", "corpus_file:", 1)) from error
    documents = [Document(text.title or _first(text.text, _TITLE), text.text) for text in texts if text.text.strip()]
    if not documents:
        raise ValueError(f"corpus_file: {path} has no text")
    return documents


def example_queries(documents: Sequence[Document], source: str) -> list[str]:
    """A few queries to try: for other corpora than Python's documentation, the first words of documents."""
    if source == PYTHON_DOCS:
        return list(PYTHON_QUERIES)
    return list(dict.fromkeys(_first(document.text, _QUERY) for document in spaced(documents, len(PYTHON_QUERIES))))


def spaced(items: Sequence[_Item], limit: int) -> list[_Item]:
    """At most `limit` items, evenly spaced.

    >>> spaced("abcdefg", 3)
    ['a', 'c', 'e']
    """
    count = min(limit, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _usable(texts: Iterable):
    for text in texts:
        if isinstance(text, Malformed):
            raise ValueError(f"corpus_file: line {text.line}: {text.reason}")
        yield text


def _first(text: str, words: int) -> str:
    return " ".join(text.split()[:words])[:_LONGEST]
