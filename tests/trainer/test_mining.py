"""Mining: search in chunks and filters compared with simple loops, and no positive among the negatives."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset

import trainer.mining as mining
from modeling_2dmse import Size
from trainer.data import check_table
from trainer.mining import (
    NegativeSelection,
    choose_negatives,
    embed,
    mine,
    prepare,
    read_beir,
    read_documents,
    text_key,
    top_candidates,
)
from trainer.shared.tables import read_table


def whole_numbers(rows, dim=3, seed=0):
    """Vectors with exact products in any order of summation, and many ties."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (rows, dim)).astype(np.float32))


def ranked(query, documents, excluded):
    """(score, number) of all documents that are not excluded, best first, ties by number, in a simple loop."""
    scores = [(sum(q * d for q, d in zip(query, row, strict=True)), i) for i, row in enumerate(documents.tolist())]
    return sorted((pair for pair in scores if pair[1] not in excluded), key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize(("query_chunk", "corpus_chunk"), [(1, 1), (3, 7), (5, 13), (4, 30), (100, 100)])
@pytest.mark.parametrize("k", [1, 6, 50])
def test_search_in_chunks_equals_brute_force_with_ties(query_chunk, corpus_chunk, k):
    queries, documents = whole_numbers(11), whole_numbers(31, seed=1)
    # none, a few, all of one chunk, nearly all, all
    excluded = [[], [0, 30], [*range(7)], [*range(29)], [*range(31)], *[[i, 2 * i, 3 * i] for i in range(1, 7)]]
    blocks = list(top_candidates(queries, documents, k, excluded, query_chunk, corpus_chunk))
    assert max(len(scores) for scores, _ in blocks) <= query_chunk
    scores, numbers = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    assert scores.shape == numbers.shape == (11, min(k, 31))
    ties = 0
    for row, query in enumerate(queries.tolist()):
        expected = ranked(query, documents, excluded[row])
        ties += len({score for score, _ in expected}) < len(expected)
        expected = expected[:k]
        assert scores[row, : len(expected)].tolist() == [score for score, _ in expected]
        assert numbers[row, : len(expected)].tolist() == [number for _, number in expected]
        assert (scores[row, len(expected) :] == -math.inf).all()
    assert ties >= 9


def test_at_most_one_block_of_cosines_is_in_memory(monkeypatch):
    shapes = []

    def recorded(queries, documents, k, first):
        shapes.append((len(queries), len(documents)))
        return top_documents(queries, documents, k, first)

    top_documents = mining.top_documents
    monkeypatch.setattr(mining, "top_documents", recorded)
    task = prepare([(f"a{i}", f"p{i}") for i in range(50)], [f"d{i}" for i in range(90)])
    mine(task, whole_numbers(50), whole_numbers(140), NegativeSelection(), query_chunk=7, corpus_chunk=40)
    assert len(shapes) == 8 * 3
    assert (max(q for q, _ in shapes), max(d for _, d in shapes)) == (7, 40)


FILTERS = [
    {},
    {"range_min": 0, "range_max": 1},
    {"range_min": 3, "range_max": 9, "num_negatives": 6},
    {"num_negatives": 4, "margin": 0.0},
    {"num_negatives": 2, "margin": 0.25},
    {"num_negatives": 2, "relative_margin": 0.2},
    {"num_negatives": 3, "max_score": 0.5},
    {"num_negatives": 2, "range_min": 2, "range_max": 25, "margin": 0.1, "relative_margin": 0.1, "max_score": 0.4},
]


def is_allowed(score, rank, positive, s):
    """The filters for one candidate."""
    inside = s.range_min < rank <= s.range_max and score > -math.inf
    far = s.margin is None or score <= positive - s.margin
    # (1 - m) times the positive's cosine, or (1 + m) times if it is negative: always below it
    share = s.relative_margin or 0.0
    limit = (1 - share) * positive if positive >= 0 else (1 + share) * positive
    relatively_far = s.relative_margin is None or score <= limit
    return inside and far and relatively_far and (s.max_score is None or score <= s.max_score)


@pytest.mark.parametrize("sampling", ["top", "random"])
@pytest.mark.parametrize("filters", FILTERS)
def test_filters_equal_a_simple_loop(filters, sampling):
    selection = NegativeSelection(**filters, sampling=sampling)
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.uniform(-1, 1, (40, 30)).astype(np.float32)).sort(dim=1, descending=True).values
    scores[0, 15:], scores[1] = -math.inf, -math.inf
    positives = torch.from_numpy(rng.uniform(-1, 1, 40).astype(np.float32))
    chosen = choose_negatives(scores, positives, selection, np.random.default_rng(1)).tolist()
    dropped = other_than_top = 0
    for row, positive in enumerate(positives.tolist()):
        candidates = enumerate(scores[row].tolist())
        left = [i for i, score in candidates if is_allowed(score, i + 1, positive, selection)]
        if len(left) < selection.num_negatives:
            dropped += 1
            assert chosen[row] == [-1] * selection.num_negatives
            continue
        best = left[: selection.num_negatives]
        other_than_top += chosen[row] != best
        assert chosen[row] == sorted(set(chosen[row]) & set(left))
        assert len(chosen[row]) == selection.num_negatives
        assert sampling == "random" or chosen[row] == best
    assert 1 <= dropped < 40  # row 1 has no candidate at all
    assert (other_than_top > 0) == (sampling == "random" and selection.range_max - selection.range_min > len(best))


def test_random_sampling_takes_every_candidate_about_equally_often():
    scores = torch.linspace(0.9, 0.1, 8).expand(4000, 8)
    selection = NegativeSelection(num_negatives=2, range_min=2, range_max=7, sampling="random")
    chosen = choose_negatives(scores, torch.ones(4000), selection, np.random.default_rng(0))
    counts = torch.bincount(chosen.flatten(), minlength=8)
    assert counts[[0, 1, 7]].sum() == 0
    assert (counts[2:7] / 1600 - 1).abs().max() < 0.1


def test_all_problems_are_named_together():
    wrong = {"num_negatives": 0, "range_min": -1, "range_max": -3, "margin": -0.1, "relative_margin": 2.0}
    with pytest.raises(ValueError, match="num_negatives: 0 is not allowed") as caught:
        NegativeSelection(**wrong, max_score=math.nan, sampling="best", seed=-1)
    for problem in ("range_min: -1 ", "range_max: -3 must be", "margin: -0.1 ", "relative_margin: 2.0 ", "seed: -1 "):
        assert problem in str(caught.value)
    assert "max_score: nan is not allowed; use a number from -1 to 1" in str(caught.value)
    assert "sampling: 'best' is unknown; choose one of top, random" in str(caught.value)
    with pytest.raises(ValueError, match=r"range_max: 10 must be at least range_min \+ num_negatives, 10 \+ 1"):
        NegativeSelection(range_min=10, range_max=10)


# An anchor in several rows and spellings, positives that differ in case and white space, anchors that are documents.
PAIRS = [
    (SENTENCES[0], SENTENCES[1]),
    (SENTENCES[0], SENTENCES[2].upper()),
    (f" {SENTENCES[0].capitalize()} ", SENTENCES[3]),
    (SENTENCES[4], SENTENCES[0]),
    (SENTENCES[5], SENTENCES[6]),
    (SENTENCES[5], SENTENCES[6]),
]
CORPUS = [*SENTENCES, SENTENCES[1].title(), SENTENCES[2].replace(" ", "  "), SENTENCES[0].upper(), "", "  "]


def test_documents_that_must_not_be_negatives():
    task = prepare(PAIRS, CORPUS, known=[(SENTENCES[5].upper(), SENTENCES[7].title()), ("elsewhere", SENTENCES[8])])
    assert task.texts[: task.num_documents] == SENTENCES  # the first of each spelling
    assert task.texts[task.num_documents :] == [SENTENCES[2].upper()]  # a positive with its own spelling
    assert task.anchors == [SENTENCES[0], f" {SENTENCES[0].capitalize()} ", SENTENCES[4], SENTENCES[5]]
    assert task.rows.tolist() == [[0, 1], [0, 20], [1, 3], [2, 0], [3, 6], [3, 6]]
    assert task.excluded == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 4], [5, 6, 7]]


def violations(known, task, negatives):
    """Rows with a negative that is a positive of the same anchor or the anchor itself, found from the texts only."""
    forbidden = {}
    for anchor, positive in known:
        forbidden.setdefault(text_key(anchor), {text_key(anchor)}).add(text_key(positive))
    rows = zip(task.rows[:, 0].tolist(), negatives.tolist(), strict=True)
    return [
        row for row in rows
        if {text_key(task.texts[n]) for n in row[1] if n >= 0} & forbidden[text_key(task.anchors[row[0]])]
    ]  # fmt: skip


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_no_positive_among_negatives(sampling, tiny_model):
    model, task = tiny_model(), prepare(PAIRS, CORPUS)
    anchors, texts = (embed(model, part, Size(1, 8)) for part in (task.anchors, task.texts))
    selection = NegativeSelection(num_negatives=16, range_min=0, range_max=16, sampling=sampling)
    negatives = mine(task, anchors, texts, selection)
    assert (negatives[:3] >= 0).all()  # exactly the sixteen that remain of twenty
    assert not violations(PAIRS, task, negatives)
    open_to_all = dataclasses.replace(task, excluded=[[] for _ in task.anchors])
    assert violations(PAIRS, task, mine(open_to_all, anchors, texts, selection))
    more = NegativeSelection(num_negatives=17, range_min=0, range_max=17, sampling=sampling)
    assert mine(task, anchors, texts, more)[:, 0].ge(0).tolist() == [False] * 3 + [True] * 3


def test_the_margin_is_relative_to_each_rows_own_positive():
    task = prepare([("a", "near"), ("a", "far")], ["near", "far", "x", "y"])
    texts = torch.tensor([[1.0, 0.0], [0.2, 0.98], [0.9, 0.44], [0.1, 0.99]])
    negatives = mine(task, torch.tensor([[1.0, 0.0]]), texts, NegativeSelection(range_min=0, margin=0.05))
    assert [task.texts[n] for n in negatives.flatten()] == ["x", "y"]


def test_chunks_and_runs_agree_and_seeds_differ():
    generator = torch.Generator().manual_seed(0)
    pairs = [(f"a{i % 17}", f"p{i}") for i in range(60)]  # unordered anchors with three or four rows each
    task = prepare(pairs, [f"d{i}" for i in range(80)])
    anchors, texts = (torch.randn(n, 4, generator=generator) for n in (17, 140))
    anchors, texts = (torch.nn.functional.normalize(part) for part in (anchors, texts))
    selection = NegativeSelection(3, range_min=2, range_max=40, margin=0.0, sampling="random")
    expected = mine(task, anchors, texts, selection)
    assert 0 < (expected[:, 0] < 0).sum() < 60
    for chunks in [(5, 11), (1, 80), (16, 1)]:
        assert torch.equal(mine(task, anchors, texts, selection, *chunks), expected)
    assert not torch.equal(mine(task, anchors, texts, dataclasses.replace(selection, seed=1)), expected)


def test_embeddings_in_chunks_equal_encode(tiny_model, monkeypatch):
    model = tiny_model(prompts={"q": "the road"})
    model.config.default_prompt_name = "q"
    expected = model.encode(SENTENCES, 2, 16, prompt="", max_length=5)
    assert abs(expected - model.encode(SENTENCES, 2, 16, max_length=5)).max() > 0.01
    monkeypatch.setattr(mining, "_ENCODE_CHUNK", 7)
    got = embed(model, SENTENCES, Size(2, 16), batch_size=3, max_length=5)
    assert (got.shape, got.dtype) == ((20, 16), torch.float32)
    assert got.numpy() == pytest.approx(expected, abs=1e-6)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_documents_of_a_table_and_of_beir(tmp_path):
    rows = [{"_id": "1", "title": "T", "text": " body ", "metadata": {}}, {"_id": "2", "title": None, "text": "b"}]
    assert read_documents(write_lines(tmp_path / "corpus.jsonl", rows)) == ["T  body", "b"]
    numbers = [{"_id": "1", "title": 0, "text": "a"}, {"_id": "2", "title": 1984, "text": "b"}]
    assert read_documents(write_lines(tmp_path / "numbers.jsonl", numbers)) == ["0 a", "1984 b"]
    Dataset.from_dict({"title": ["T", "U"], "text": ["a", ""]}).to_csv(tmp_path / "t.csv", index=False)
    assert read_documents(str(tmp_path / "t.csv")) == ["a", ""]
    with pytest.raises(ValueError, match=r"corpus_file: column text of .*n.jsonl holds int64, not texts"):
        read_documents(write_lines(tmp_path / "n.jsonl", [{"text": 1}]))
    with pytest.raises(ValueError, match=r"corpus_file: .*m.jsonl has no column text among body"):
        read_documents(write_lines(tmp_path / "m.jsonl", [{"body": "a"}]))


def test_pairs_of_a_beir_folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    documents = [{"_id": str(i), "title": 0 if i == 1 else "T", "text": f"d{i}"} for i in range(5)]
    write_lines(tmp_path / "corpus.jsonl", [*documents, {"_id": "none", "title": "", "text": " "}])
    texts = {"q": "what", "r": "who", "s": "What", "e": ""}
    write_lines(tmp_path / "queries.jsonl", [{"_id": query, "text": text} for query, text in texts.items()])
    head = "query-id\tcorpus-id\tscore\n"
    relevant = "q\t0\t1\nq\t1\t2\nq\t2\t0\nr\t3\t1\nr\tabsent\t1\nr\tnone\t1\ne\t0\t1\n"
    (tmp_path / "qrels" / "train.tsv").write_text(head + relevant)
    (tmp_path / "qrels" / "test.tsv").write_text(head + "s\t4\t1\nr\t1\t0\n")
    (tmp_path / "qrels" / "dev.tsv").write_text(head + "r\t0\t1\n")
    pairs, corpus, known = read_beir(str(tmp_path), "train")
    assert pairs == [("what", "T d0"), ("what", "0 d1"), ("who", "T d3")]
    assert corpus == ["T d0", "0 d1", "T d2", "T d3", "T d4", ""]
    assert known == [("who", "T d0"), ("What", "T d4")]
    assert prepare(pairs, corpus, known).excluded == [[0, 1, 4], [0, 3]]


@pytest.mark.parametrize("data", ["scifact", "nli"])
def test_no_positive_among_negatives_of_real_data(data, minilm, data_dir):
    if data == "scifact":
        pairs, corpus, known = read_beir(str(data_dir / "scifact"), "train")
        corpus = [*corpus[:300], *(positive for _, positive in [*pairs, *known])]  # all documents would take minutes
    else:
        table = check_table(read_table(str(data_dir / "nli" / "triplets.csv.gz"))).select(range(2000))
        pairs, known = list(zip(table["anchor"][:], table["positive"][:], strict=True)), []
        corpus = [*table["positive"][:], *(anchor.upper() for anchor in table["anchor"][:500])]
    task = prepare(pairs, corpus, known)
    anchors, texts = (embed(minilm, part, Size(1, 32), max_length=32) for part in (task.anchors, task.texts))
    selection = NegativeSelection(num_negatives=5, range_min=0, range_max=50)
    negatives = mine(task, anchors, texts, selection)
    assert (negatives >= 0).all()
    assert max(map(len, task.excluded)) > 2
    assert not violations([*pairs, *known], task, negatives)
    # without the exclusion, these are the nearest texts
    open_to_all = dataclasses.replace(task, excluded=[[] for _ in task.anchors])
    assert violations([*pairs, *known], task, mine(open_to_all, anchors, texts, selection))
