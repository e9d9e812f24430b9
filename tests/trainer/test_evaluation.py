"""Metrics compared with simple references, tasks, the grid in one pass, and published results of all-MiniLM-L6-v2."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from modeling_2dmse import parse_ladder
from trainer.evaluation import (
    RetrievalData,
    StsData,
    evaluate_retrieval,
    evaluate_sts,
    evaluate_tasks,
    grid_sizes,
    load_beir,
    load_sts,
    mean_scores,
    retrieval_from_pairs,
)
from trainer.metrics import EmbeddingSimilarity
from trainer.ranking import merge_top, ranking_metrics, top_documents

LADDER_SIZES = parse_ladder(LADDER)
STS = StsData("sts", SENTENCES[::2], SENTENCES[1::2], [0, 5, 1, 4, 2, 3, 2.5, 1.5, 0.5, 4.5])


def ranks(values):
    """Ranks by counting; ties have their average rank."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def correlation(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return cov / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_metric_class_without_network():
    predictions, references = [0.1, 0.5, 0.5, 0.9, 0.3], [1, 2, 3, 3, 0]
    result = EmbeddingSimilarity().compute(predictions=predictions, references=references)
    assert result["pearson"] == pytest.approx(correlation(predictions, references))
    assert result["spearman"] == pytest.approx(correlation(ranks(predictions), ranks(references)))
    constant = EmbeddingSimilarity().compute(predictions=[1.0, 1.0], references=[1, 2])
    assert constant == {"spearman": 0.0, "pearson": 0.0}


def test_sts_at_every_size_equals_encode(tiny_model):
    model = tiny_model()
    result = evaluate_sts(model, STS, parse_ladder(LADDER))
    assert result["n"] == 10
    for size in parse_ladder(LADDER):
        left, right = (model.encode(side, *size) for side in (STS.sentence1, STS.sentence2))
        cosine = (left * right).sum(1).tolist()
        assert result["spearman"][str(size)] == pytest.approx(correlation(ranks(cosine), ranks(STS.score)), abs=1e-6)
        assert result["pearson"][str(size)] == pytest.approx(correlation(cosine, STS.score), abs=1e-5)


def reference_metrics(scores, ids, judged):
    """One query as in trec_eval: sorted by score, then by larger document id."""
    ranked = [d for _, d in sorted(((s, d) for s, d in zip(scores, ids, strict=True)), reverse=True)]
    dcg = sum(judged.get(d, 0) / math.log2(r + 2) for r, d in enumerate(ranked[:10]))
    ideal = sum(g / math.log2(r + 2) for r, g in enumerate(sorted(judged.values(), reverse=True)[:10]))
    relevant = {d for d, g in judged.items() if g > 0}
    first = next((r for r, d in enumerate(ranked[:10], start=1) if d in relevant), None)
    return dcg / ideal, 1 / first if first else 0.0, len(relevant & set(ranked[:100])) / len(relevant)


def test_retrieval_equals_a_simple_reference_with_ties_and_graded_judgements(tiny_model, monkeypatch):
    model = tiny_model()
    rng = random.Random(0)
    # every text appears twelve times: there are ties everywhere, also around ranks 10 and 100
    corpus = {f"d{i}": SENTENCES[i % 20] for i in range(240)}
    queries = {f"q{i}": " ".join(rng.sample(SENTENCES[i].split(), 3)) for i in range(6)}
    qrels = {q: {f"d{rng.randrange(240)}": rng.choice([0, 1, 1, 2]) for _ in range(15)} | {"d5": 1} for q in queries}
    data = RetrievalData("toy", queries, corpus, qrels)
    import trainer.evaluation as module

    for chunk in (1000, 37):  # the corpus in one chunk and in several
        monkeypatch.setattr(module, "_CORPUS_CHUNK", chunk)
        result = evaluate_retrieval(model, data, parse_ladder(LADDER), batch_size=240)
        for size in parse_ladder(LADDER):
            unique = model.encode(SENTENCES, *size, batch_size=20)
            documents = np.stack([unique[i % 20] for i in range(240)])
            scores = (model.encode(list(queries.values()), *size) @ documents.T).round(5)
            expected = np.mean(
                [reference_metrics(scores[i], list(corpus), qrels[q]) for i, q in enumerate(queries)], axis=0
            )
            got = [result[metric][str(size)] for metric in ("ndcg@10", "mrr@10", "recall@100")]
            assert got == pytest.approx(expected.tolist(), abs=1e-9), (chunk, size)


def test_cross_sizes_rank_documents_of_one_size_for_queries_of_another(tiny_model):
    model = tiny_model()
    queries = {f"q{i}": text for i, text in enumerate(SENTENCES[:5])}
    corpus = {f"d{i:02d}": text for i, text in enumerate(SENTENCES)}
    qrels = {f"q{i}": {f"d{i + 3:02d}": 1, f"d{i + 9:02d}": 2} for i in range(5)}
    data = RetrievalData("r", queries, corpus, qrels)
    result = evaluate_retrieval(model, data, LADDER_SIZES, cross_sizes=True)
    assert list(result["cross_ndcg@10"]) == [str(size) for size in LADDER_SIZES]
    for query in LADDER_SIZES:
        for document in LADDER_SIZES:
            dim = min(query.dim, document.dim)
            asked = model.encode(list(queries.values()), query.num_layers, dim)
            stored = model.encode(list(corpus.values()), document.num_layers, dim)
            values = []
            for row, gains in zip(asked @ stored.T, qrels.values(), strict=True):
                ranked = sorted(corpus, key=lambda name, row=row: (-row[int(name[1:])], name))
                found = [gains.get(name, 0) / math.log2(place + 2) for place, name in enumerate(ranked[:10])]
                values.append(sum(found) / (2 + 1 / math.log2(3)))
            assert result["cross_ndcg@10"][str(query)][str(document)] == pytest.approx(np.mean(values), abs=1e-6)
    assert evaluate_retrieval(model, data, LADDER_SIZES) == {k: v for k, v in result.items() if k != "cross_ndcg@10"}


def test_ties_at_the_cut_keep_the_order_of_the_documents():
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [1.0, 0.0]])
    scores, numbers = top_documents(queries, documents, k=3)
    assert numbers.tolist() == [[1, 4, 0]]
    merged = merge_top(top_documents(queries, documents[:2], 3), top_documents(queries, documents[2:], 3, first=2), 3)
    assert merged[1].tolist() == [[1, 4, 0]]
    assert torch.equal(merged[0], scores)


def test_ranking_metrics_by_hand():
    result = ranking_metrics([["a", "b", "c"]], [{"b": 2, "c": 1, "x": 1}])
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert result["ndcg@10"] == pytest.approx((2 / math.log2(3) + 1 / 2) / ideal)
    assert result["mrr@10"] == 0.5
    assert result["recall@100"] == pytest.approx(2 / 3)


def test_beir_layout(tmp_path):
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": "1", "title": "T", "text": "body"}, {"_id": "2", "title": "", "text": " only text "}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "what"}\n{"_id": "unjudged", "text": "x"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\nq\t2\t0\n")
    data = load_beir(str(folder))
    assert data.name == "toy"
    assert data.corpus == {"1": "T body", "2": "only text"}
    assert data.queries == {"q": "what"}
    assert data.qrels == {"q": {"1": 1, "2": 0}}
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(ValueError, match=r"beir_dirs: .*corpus.jsonl is missing"):
        load_beir(str(folder))


def test_pairs_become_a_search_task():
    table = Dataset.from_dict({"anchor": ["a", "a", "b"], "positive": ["x", "y", "x"], "negative": ["n", "x", "n"]})
    data = retrieval_from_pairs("eval", table)
    texts = {query: {data.corpus[d] for d in data.qrels[query]} for query in data.queries}
    assert {data.queries[q]: docs for q, docs in texts.items()} == {"a": {"x", "y"}, "b": {"x"}}
    assert sorted(data.corpus.values()) == ["n", "x", "y"]


def test_the_grid_encodes_each_text_once(tiny_model):
    model, rows = tiny_model(), []
    count = lambda m, args, kwargs, out: rows.append(len(kwargs.get("packing", kwargs["input_ids"])))
    model.register_forward_hook(count, with_kwargs=True)
    sizes = grid_sizes(4, [8, 16, 32])
    assert len(sizes) == 12
    results = evaluate_tasks(model, [STS], sizes)
    assert sum(rows) == 20
    assert set(mean_scores(results)) == {str(size) for size in sizes}


@pytest.mark.parametrize(("name", "published"), [("stsb-test", 0.8203), ("sts13", 0.8060)])
def test_published_sts_results_of_minilm(name, published, minilm, data_dir):
    result = evaluate_sts(minilm, load_sts(str(data_dir / "sts" / f"{name}.csv")), parse_ladder(["6x384"]))
    assert result["spearman"]["6x384"] == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("a,b,1", "has one row"),
        ("a,b,2\nc,d,2", "has 2 rows that all have the score 2"),
        ("a,a,1\nb,b,2", "has 2 rows that all have the same text twice"),
        ("a,b,1\na,b,2", "has 2 rows that all are of the same two texts"),
    ],
)
def test_rows_without_a_correlation_are_refused(rows, what, tmp_path):
    (tmp_path / "a.csv").write_text(f"sentence1,sentence2,score\n{rows}\n")
    with pytest.raises(ValueError, match=rf"^sts_files: .*a\.csv {what}; a correlation needs different"):
        load_sts(str(tmp_path / "a.csv"))
