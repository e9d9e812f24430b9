"""Pairs of a query and a passage, made from a corpus without labels.

A pair is one of these, whichever the document allows, drawn at random:

- its title and its text;
- one of its sentences and the rest of it (Lee et al. 2019, the inverse cloze task, with sentences);
- some of its words and the whole of it, if it has neither a title nor two sentences.

A text in a language without spaces is measured in characters instead of words.
"""

import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# The ends of sentences, those of Chinese and Japanese too.
_SENTENCE_END = re.compile("(?<=[.!?\u2026])\\s+|(?<=[\u3002\uff01\uff1f])|\n+")
# Words of a query that is a sentence; a longer one is cut.
_QUERY_WORDS = 40
# Words of a query that is cut out of a text.
_SPAN = (3, 16)
# A text whose words are longer than this on average has no spaces between words.
_LONG_WORD = 25
# Characters that stand for a word in such a text.
_WORD_CHARACTERS = 2
# Rounds in a row without a new pair after which the documents are taken to have no more.
_FRUITLESS = 10


class Document(NamedTuple):
    """A text of a corpus, and its title, if it has one."""

    text: str
    title: str = ""

    @property
    def whole(self) -> str:
        """The title, a space and the text, stripped."""
        return f"{self.title} {self.text}".strip()


def draw_documents(documents: Iterable[Document], limit: int, seed: int) -> list[Document]:
    """Draw different documents from a stream of any length, each with the same probability (Vitter 1985, algorithm R).

    Args:
        documents: the stream; documents without words are left out, and so are those that only differ in case or white
            space from one that is kept.
        limit: the largest number of documents; no more are in memory.
        seed: seed of the drawing.

    Returns:
        at most `limit` documents, in a random order.
    """
    rng, seen = random.Random(seed), 0
    kept: list[Document] = []
    for document in documents:
        if not document.whole:
            continue
        seen += 1
        if len(kept) < limit:
            kept.append(document)
        elif (place := rng.randrange(seen)) < limit:
            kept[place] = document
    different = list({_key(document): document for document in kept}.values())
    rng.shuffle(different)
    return different


def make_pairs(documents: Sequence[Document], count: int, seed: int, max_words: int) -> list[tuple[str, str]]:
    """Make different pairs, round by round over all documents in a random order.

    Args:
        documents: the documents.
        count: the number of pairs; fewer are made if the documents have no more.
        seed: seed of the drawing.
        max_words: longest passage in words. That of a longer document starts anywhere in it.

    Returns:
        (query, passage) pairs. Those of one document are as far apart as can be.
    """
    rng = random.Random(seed)
    pairs: dict[tuple[str, str], None] = {}
    fruitless = 0
    while len(pairs) < count and fruitless < _FRUITLESS:
        before = len(pairs)
        for document in rng.sample(documents, len(documents)):
            pair = _pair(document, rng, max_words)
            if pair is not None:
                pairs.setdefault(pair)
            if len(pairs) == count:
                break
        fruitless = fruitless + 1 if len(pairs) == before else 0
    return list(pairs)


def _pair(document: Document, rng: random.Random, max_words: int) -> tuple[str, str] | None:
    sentences = [part.strip() for part in _SENTENCE_END.split(document.text) if part.strip()]
    kinds = ["title"] * bool(document.title and document.text.strip()) + ["sentence"] * (len(sentences) > 1)
    kind = rng.choice(kinds) if kinds else "span"
    if kind == "title":
        query, passage = document.title, document.text
    elif kind == "sentence":
        chosen = rng.randrange(len(sentences))
        rest = " ".join(sentences[:chosen] + sentences[chosen + 1 :])
        query, passage = sentences[chosen], Document(rest, document.title if rng.random() < 0.5 else "").whole
    else:
        passage = document.whole
        query = _window(passage, rng.randint(*_SPAN), rng)
    query, passage = _window(query, _QUERY_WORDS, rng), _window(passage, max_words, rng)
    return (query, passage) if query and query != passage else None


def _window(text: str, words: int, rng: random.Random) -> str:
    """The text, or as many words of it if it is longer; half of the windows start at its beginning."""
    units, joint = text.split(), " "
    if len(text) > _LONG_WORD * len(units):
        units, joint, words = list(text), "", words * _WORD_CHARACTERS
    if len(units) <= words:
        return text
    start = rng.choice((0, rng.randrange(len(units) - words + 1)))
    return joint.join(units[start : start + words]).strip()


def _key(document: Document) -> str:
    return " ".join(document.whole.casefold().split())
