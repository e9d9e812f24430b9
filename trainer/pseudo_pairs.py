"""Pairs of a query and a passage, made from a corpus without labels.

A pair is one of these, whichever the document allows, drawn at random:

- its title and its text;
- one of its sentences and the rest of it (Lee et al. 2019, the inverse cloze task, with sentences);
- some of its words and the whole of it, if it has neither a title nor two sentences.

A text in a language without spaces is measured in characters instead of words.
"""

import hashlib
import heapq
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
# A text that is longer, in characters or in characters for each word of a passage, is cut to so many for a pair.
_EXCERPT, _EXCERPT_PER_WORD = 50_000, 20
# Rounds in a row without a new pair after which the documents are taken to have no more.
_FRUITLESS = 10
# Fewer different documents leave nothing to fit or to find.
FEWEST = 16


class Document(NamedTuple):
    """A text of a corpus, and its title, if it has one."""

    text: str
    title: str = ""

    @property
    def whole(self) -> str:
        """The title, a space and the text, stripped; the text alone if the title is the same."""
        return f"{self.title} {self.text}".strip() if self.titled else self.text.strip()

    @property
    def titled(self) -> bool:
        """Whether the title says something that the text does not consist of."""
        return self.title.strip() not in ("", self.text.strip())


def draw_documents(documents: Iterable[Document], limit: int, seed: int) -> list[Document]:
    """Draw different documents from a stream of any length, each with the same probability (Cohen & Kaplan 2007).

    Args:
        documents: the stream; documents without words are left out. Those that only differ in case or white space are
            one document, and as probable as any other.
        limit: the largest number of documents; no more are in memory.
        seed: seed of the drawing.

    Returns:
        at most `limit` documents, in a random order.
    """
    # The documents with the smallest random numbers ("bottom-k sketches"), which repetitions share.
    kept: dict[int, Document] = {}
    ranks: list[int] = []  # those of the kept documents, negative, so that the largest one is first
    for document in documents:
        if not document.whole:
            continue
        rank = _rank(document, seed)
        if rank not in kept and len(kept) == limit:
            if -ranks[0] < rank:
                continue
            del kept[-heapq.heapreplace(ranks, -rank)]
        elif rank not in kept:
            heapq.heappush(ranks, -rank)
        kept[rank] = document
    drawn = list(kept.values())
    random.Random(seed).shuffle(drawn)
    return drawn


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
    return list(_draw_pairs(documents, count, seed, max_words))


def make_queries(documents: Sequence[Document], count: int, seed: int, max_words: int) -> list[tuple[str, int]]:
    """The queries of `make_pairs`, each with the place in `documents` of the one that it is made from."""
    pairs = _draw_pairs(documents, count, seed, max_words)
    return [(query, place) for (query, _), place in pairs.items()]


def _draw_pairs(documents: Sequence[Document], count: int, seed: int, max_words: int) -> dict[tuple[str, str], int]:
    """The place of the document of each pair."""
    rng = random.Random(seed)
    pairs: dict[tuple[str, str], int] = {}
    fruitless = 0
    while len(pairs) < count and fruitless < _FRUITLESS:
        before = len(pairs)
        for place in rng.sample(range(len(documents)), len(documents)):
            pair = _pair(documents[place], rng, max_words)
            if pair is not None:
                pairs.setdefault(pair, place)
            if len(pairs) == count:
                break
        fruitless = fruitless + 1 if len(pairs) == before else 0
    return pairs


def _pair(document: Document, rng: random.Random, max_words: int) -> tuple[str, str] | None:
    document = document._replace(text=_excerpt(document.text, max(_EXCERPT, _EXCERPT_PER_WORD * max_words), rng))
    sentences = [part.strip() for part in _SENTENCE_END.split(document.text) if part.strip()]
    kinds = ["title"] * bool(document.titled and document.text.strip()) + ["sentence"] * (len(sentences) > 1)
    kind = rng.choice(kinds) if kinds else "span"
    if kind == "title":
        query, passage = document.title, document.text
    elif kind == "sentence":
        chosen = rng.randrange(len(sentences))
        rest = ("" if _is_unspaced(document.text) else " ").join(sentences[:chosen] + sentences[chosen + 1 :])
        query, passage = sentences[chosen], Document(rest, document.title if rng.random() < 0.5 else "").whole
    else:
        passage = document.whole
        query = _window(passage, rng.randint(*_SPAN), rng)
    query, passage = _window(query, _QUERY_WORDS, rng), _window(passage, max_words, rng)
    return (query, passage) if query != passage and _has_words(query) and _has_words(passage) else None


def _has_words(text: str) -> bool:
    """Whether a text is more than brackets, bars and rules, which code and tables have as lines of their own."""
    return any(map(str.isalnum, text))


def _window(text: str, words: int, rng: random.Random) -> str:
    """The text, or as many words of it if it is longer; half of the windows start at its beginning."""
    units, joint = text.split(), " "
    if _is_unspaced(text):
        units, joint, words = list(text), "", words * _WORD_CHARACTERS
    if len(units) <= words:
        return text
    start = rng.choice((0, rng.randrange(len(units) - words + 1)))
    return joint.join(units[start : start + words]).strip()


def _is_unspaced(text: str) -> bool:
    """Whether a text has no spaces between its words."""
    return len(text) > _LONG_WORD * len(text.split())


def _excerpt(text: str, length: int, rng: random.Random) -> str:
    """The text, or as many characters of it if it is longer, without the parts of words at the ends."""
    if len(text) <= length:
        return text
    start = rng.choice((0, rng.randrange(len(text) - length + 1)))
    part = text[start : start + length]
    part = (part.split(None, 1) or [""])[-1] if start else part
    return (part.rsplit(None, 1) or [""])[0]


def normalize(text: str) -> str:
    """What two texts have in common that only differ in case and white space."""
    return " ".join(text.casefold().split())


def _rank(document: Document, seed: int) -> int:
    """A number that is random, but the same for the same document."""
    key = normalize(document.whole).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest())
