"""Reading folders in BEIR layout; what is wrong in a file is named with its line."""

import csv
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from retrieval.reading import read_title

_SURROGATE = re.compile("[\ud800-\udfff]")
_COLUMNS = ["query-id", "corpus-id", "score"]


def read_beir_folder(
    folder: str, split: str, argument: str
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """The queries, the corpus and the judgements of a split, without queries that nothing is relevant for.

    The text of a document is its title (a number is one too), a space and its text, stripped.

    Args:
        folder: with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.
        split: name of the judgements.
        argument: the name that errors give to the folder.

    Returns:
        texts of queries by id, texts of documents by id, and gains by query and document.

    Raises:
        ValueError: a file is missing, or a line of it is not as it should be; or the corpus is empty.
    """
    paths = [os.path.join(folder, name) for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{argument}: {folder} is not in BEIR layout: {missing[0]} is missing")
    corpus, queries = _read_texts(paths[0], argument, titled=True), _read_texts(paths[1], argument, titled=False)
    if not corpus:
        raise ValueError(f"{argument}: {paths[0]} has no documents")
    qrels: dict[str, dict[str, int]] = {}
    for query, document, gain in _read_judgements(paths[2], argument):
        qrels.setdefault(query, {})[document] = gain
    qrels = {query: gains for query, gains in qrels.items() if query in queries and any(g > 0 for g in gains.values())}
    return {query: queries[query] for query in qrels}, corpus, qrels


def _read_texts(path: str, argument: str, titled: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{argument}: line {number} of {path}"
            row = _parse(line, place)
            name, title, text = row.get("_id"), read_title(row.get("title") if titled else None), row.get("text")
            if not isinstance(name, str) or not name:
                raise ValueError(f"{place} has no text as its _id: {name!r}")
            if not isinstance(text, str) or title is None:
                found = f"the text of {name!r} is {text!r}, its title {row.get('title')!r}"
                raise ValueError(f"{place} is wrong: {found}")
            if name in texts:
                raise ValueError(f"{place} has the _id {name!r} a second time")
            texts[name] = f"{title} {text}".strip() if titled else text
            if _SURROGATE.search(name) or _SURROGATE.search(texts[name]):
                raise ValueError(f"{place} has half of a surrogate pair, which is not valid Unicode")
    return texts


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object")
    return row


def _read_judgements(path: str, argument: str) -> Iterator[tuple[str, str, int]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            heading = next(reader, [])
            if not all(heading.count(name) == 1 for name in _COLUMNS):
                raise ValueError(f"{argument}: {path} has no heading {' '.join(_COLUMNS)}, but {heading}")
            places = [heading.index(name) for name in _COLUMNS]
            for values in reader:
                place = f"{argument}: line {reader.line_num} of {path}"
                if values and len(values) != len(heading):
                    raise ValueError(f"{place} has {len(values)} columns instead of {len(heading)}")
                if values:
                    yield _judgement([values[number] for number in places], place)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{argument}: {path} is not a table in UTF-8: {error}") from error


def _judgement(values: list[str], place: str) -> tuple[str, str, int]:
    query, document, gain = values
    try:
        return query, document, int(gain)
    except ValueError as error:
        raise ValueError(f"{place} has the score {gain!r}; use whole numbers") from error
