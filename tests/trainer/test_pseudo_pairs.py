"""Documents drawn from a stream, and pairs of a query and a passage made from them."""

import itertools
import random

import pytest

from trainer import pseudo_pairs
from trainer.pseudo_pairs import Document, draw_documents, make_pairs, make_queries

TITLED = Document("the first sentence is here. the second one follows. a third ends it.", "a title")


def numbers(texts) -> list[int]:
    return [int(document.text) for document in texts]


def test_every_document_of_a_stream_is_drawn_with_the_same_probability():
    counts = [0] * 30
    for seed in range(3000):
        for number in numbers(draw_documents((Document(str(n)) for n in range(30)), 6, seed)):
            counts[number] += 1
    # 600 expected of each; the standard deviation is 22.
    assert min(counts) > 500
    assert max(counts) < 700


def test_no_more_documents_are_kept_than_the_limit_and_the_draw_depends_on_the_seed():
    alive = 0

    class Counted(str):
        def __new__(cls, value):
            nonlocal alive
            alive += 1
            assert alive <= 12
            return super().__new__(cls, value)

        def __del__(self):
            nonlocal alive
            alive -= 1

    drawn = draw_documents((Document(Counted(n)) for n in range(500)), 10, 0)
    assert len(drawn) == len(set(drawn)) == 10
    again = [numbers(draw_documents((Document(str(n)) for n in range(500)), 10, seed)) for seed in (0, 1)]
    assert again[0] == numbers(drawn) != again[1]
    assert again[0] != sorted(again[0]), "the order is random"
    assert max(again[0]) > 100, "the whole stream is used"


def test_documents_that_differ_in_case_or_white_space_are_one_and_empty_ones_none():
    texts = ["One  text", "one text ", "ONE\nTEXT", "", "  ", "another"]
    assert {d.text.casefold().split()[0] for d in draw_documents(map(Document, texts), 9, 0)} == {"one", "another"}
    assert len(draw_documents(map(Document, texts), 9, 0)) == 2
    assert draw_documents([Document(""), Document(" ", " ")], 9, 0) == []
    assert len(draw_documents([Document("a", "title"), Document("title a")], 9, 0)) == 1
    assert draw_documents([Document("", "only a title")], 9, 0) == [Document("", "only a title")]


def test_repetitions_do_not_take_the_place_of_other_documents():
    stream = [Document("The footer of every page")] * 500 + [Document(str(n)) for n in range(8)]
    for seed in range(20):
        random.Random(seed).shuffle(stream)
        assert len(draw_documents(stream, 8, seed)) == 8
    drawn = [document.text for seed in range(300) for document in draw_documents(stream, 3, seed)]
    assert 70 < drawn.count("The footer of every page") < 130, "100 are expected"


def test_a_title_that_is_the_text_says_nothing():
    text = "some words without an end that are long enough"
    document = Document(text, f" {text}")
    assert document.whole == text
    pairs = make_pairs([document], 5, 0, 50)
    assert len(pairs) == 5
    assert all(passage == text and query in text for query, passage in pairs)
    assert len(draw_documents([document, Document(text)], 9, 0)) == 1
    assert Document("", "only a title").whole == "only a title"


def test_a_very_long_text_is_cut_before_it_is_split(monkeypatch):
    class Splits:
        def split(self, text):
            assert len(text) <= 50_000
            return pattern.split(text)

    pattern = pseudo_pairs._SENTENCE_END
    monkeypatch.setattr(pseudo_pairs, "_SENTENCE_END", Splits())
    words = [f"w{n}{'.' * (n % 9 == 0)}" for n in range(100_000)]
    pairs = make_pairs([Document(" ".join(words)), Document("x" * 90_000), Document("x " + " " * 90_000)], 200, 0, 30)
    known, starts = set(words), []
    for texts in pairs:
        if texts[0][0] == "w":
            assert {word for text in texts for word in text.split()} <= known
            starts.append(int(texts[0].split()[0].strip("w.")))
    assert min(starts) < 10_000
    assert max(starts) > 80_000


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (Document("some words without an end", "a title"), {("a title", "some words without an end")}),
        (
            Document("one is here. two is there"),
            {("one is here.", "two is there"), ("two is there", "one is here.")},
        ),
        (
            TITLED._replace(text="one is here. two is there"),
            {
                ("a title", "one is here. two is there"),
                ("one is here.", "two is there"),
                ("one is here.", "a title two is there"),
                ("two is there", "one is here."),
                ("two is there", "a title one is here."),
            },
        ),
    ],
)
def test_kinds_of_pairs(document, expected):
    assert set(make_pairs([document], 99, 0, max_words=50)) <= expected
    found = set(itertools.chain.from_iterable(make_pairs([document], 99, seed, 50) for seed in range(30)))
    assert found == expected


def test_a_document_without_title_and_sentences_gives_some_of_its_words():
    words = [f"w{n}" for n in range(60)]
    pairs = make_pairs([Document(" ".join(words))], 40, 0, max_words=100)
    assert len(pairs) == 40
    for query, passage in pairs:
        assert passage == " ".join(words)
        start = words.index(query.split()[0])
        assert query.split() == words[start : start + len(query.split())]
        assert 3 <= len(query.split()) <= 16


def test_all_parts_of_long_documents_are_used_and_passages_are_no_longer_than_asked():
    sentences = [f"s{n} a b c d e f g h i." for n in range(200)]
    pairs = make_pairs([Document(" ".join(sentences))], 400, 0, max_words=30)
    assert all(len(passage.split()) <= 30 for _, passage in pairs)
    for texts in zip(*pairs, strict=True):
        starts = [int(word[1:]) for text in texts for word in text.split() if word[1:].isdigit()]
        assert {start // 20 for start in starts} == set(range(10))
    query, _ = make_pairs([Document(" ".join(f"w{n}" for n in range(99)) + ". end")], 1, 1, 30)[0]
    assert len(query.split()) <= 40


def test_pairs_are_distinct_deterministic_and_never_of_a_text_with_itself():
    rng = random.Random(0)
    documents = [
        Document(". ".join(" ".join(rng.choices("abcde", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))))
        for _ in range(40)
    ]
    pairs = make_pairs(documents, 100, 0, max_words=8)
    assert len(pairs) == len(set(pairs)) == 100
    assert all(query and passage and query != passage for query, passage in pairs)
    assert make_pairs(documents, 100, 0, 8) == pairs != make_pairs(documents, 100, 1, 8)


def test_queries_come_with_the_place_of_their_document():
    documents = [Document(f"d{n} one is here. d{n} two is there.", f"d{n}") for n in range(20)]
    queries = make_queries(documents, 50, 0, max_words=8)
    assert [query for query, _ in queries] == [query for query, _ in make_pairs(documents, 50, 0, 8)]
    assert len(queries) == 50
    assert all(query.split()[0] == f"d{place}" for query, place in queries)


def test_pairs_of_a_document_are_far_apart():
    documents = [Document(f"d{n} one is here. d{n} two is there.") for n in range(20)]
    first = [query.split()[0] for query, _ in make_pairs(documents, 20, 0, 50)]
    assert sorted(first) == sorted(f"d{n}" for n in range(20))


def test_texts_without_spaces_are_cut_by_characters():
    text = "".join(chr(0x4E00 + n) for n in range(600))
    for query, passage in make_pairs([Document(text)], 20, 0, max_words=50):
        assert passage in text
        assert query in text
        assert len(passage) <= 100
        assert 6 <= len(query) <= 32
    sentences = [f"{chr(0x4E00 + 9 * n) * 9}\u3002" for n in range(3)]
    for query, passage in make_pairs([Document("".join(sentences))], 3, 0, max_words=50):
        assert query in sentences
        assert query not in passage
    text = "".join(sentences * 30)
    for _, passage in make_pairs([Document(text), Document(text[7:], "title")], 40, 0, max_words=12):
        assert len(passage) <= 24, "what is left of a text without a sentence is cut by characters, too"
        assert " " not in passage.removeprefix("title ")


def test_making_pairs_ends_when_there_is_nothing_new():
    assert make_pairs([Document("word")], 10, 0, 50) == []
    assert make_pairs([Document("a text", "its title")], 10, 0, 50) == [("its title", "a text")]
    assert make_pairs([], 10, 0, 50) == []
    assert make_pairs([Document("same. same. same.")], 10, 0, 50) == [("same.", "same. same.")]


def test_lines_without_a_letter_or_digit_are_neither_queries_nor_passages():
    table = Document("| a | b |\n|---|---|\n| one | two |\n}\n", "")
    code = Document("}\n};\nreturn 0;\n}", "---")
    pairs = make_pairs([table, code, Document("* * *", "***"), Document("---\n...", "")], 200, 0, 50)
    assert {query for query, _ in pairs} == {"| a | b |", "| one | two |"}  # what is left of `code` says nothing
    assert all(any(map(str.isalnum, text)) for pair in pairs for text in pair)
