"""Exit projections that are trained alone, on states that are computed once."""

import pytest
import torch
from conftest import SENTENCES
from torch.nn.functional import normalize

from modeling_2dmse import parse_ladder
from modeling_2dmse.encoding import to_embeddings
from modeling_2dmse.pooling import cut_and_normalize
from trainer import fit_exit_projections, refining
from trainer.alignment import score_kl
from trainer.refining import SCALE, dims_of_last_exit, join_targets, refine_exit_projections, rotate_last_exit

TEXTS = [f"{a} and {b}" for a in SENTENCES for b in SENTENCES[:6]]
SIZES = parse_ladder(["1x8", "2x8", "2x16", "4x16", "4x32"])


def divergences(model, targets) -> dict[str, float]:
    states = model.encode_states(TEXTS)
    return {
        str(size): score_kl(cut_and_normalize(states[size.num_layers - 1], size.dim), targets, SCALE).item()
        for size in SIZES
    }


def refined(tiny_model, **kwargs):
    model = tiny_model()
    fit_exit_projections(model, TEXTS)
    targets = torch.from_numpy(model.encode(TEXTS))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = divergences(model, targets)
    refine_exit_projections(model, TEXTS, targets, SIZES, **{"steps": 60, **kwargs})
    return model, before, found, divergences(model, targets)


def test_similarities_of_shallow_sizes_come_nearer_and_nothing_else_changes(tiny_model):
    model, before, first, then = refined(tiny_model)
    for size in ("1x8", "2x8", "2x16"):
        assert then[size] < 0.9 * first[size], size
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"exit_projections.0.weight", "exit_projections.1.weight"}, (
        "not the last exit, nor off the ladder"
    )


PAIRS = [(2 * place, 2 * place + 1) for place in range(20)]


def own_document_probability(model, size) -> float:
    """What a query gives to its own document among those of all pairs, in the mean of the logarithm."""
    vectors = to_embeddings(model.encode_states(TEXTS)[size.num_layers - 1], size.dim, "cosine")
    queries, documents = vectors[[query for query, _ in PAIRS]], vectors[[document for _, document in PAIRS]]
    return (SCALE * queries @ documents.T).log_softmax(dim=-1).diagonal().mean().item()


def test_queries_find_their_documents_better_by_pairs(tiny_model):
    models = [refined(tiny_model, pairs=pairs)[0] for pairs in ([], PAIRS)]
    for size in SIZES[:3]:
        alone, paired = (own_document_probability(model, size) for model in models)
        assert paired > alone + 0.05, size


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_loss_of_pairs_is_a_divergence_over_documents_and_infonce(similarity, monkeypatch):
    monkeypatch.setattr(refining, "QUERIES", 8)
    generator = torch.Generator().manual_seed(0)
    states, targets = (torch.randn(30, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = to_embeddings(targets, 6, similarity).double()
    pairs = [(place, 29 - place) for place in range(10)]
    batches = refining._Batches(targets, similarity, torch.Generator().manual_seed(1), pairs)
    drawn = []
    outputs = lambda rows: drawn.append(rows.tolist()) or [states[rows]]
    got = batches.loss(outputs, [[4]])
    queries, others, found = drawn[0][:4], drawn[0][4:8], drawn[0][8:]
    own = dict(pairs)
    assert set(queries) <= set(own)
    assert set(found) == set(range(10, 30)) - set(others), "the documents that do not search"
    assert len(found) == len(set(found))
    scale = SCALE if similarity == "cosine" else 1.0
    cut = [row[:4] / (row[:4].norm() if similarity == "cosine" else 1) for row in states]
    divergences, infonce = [], []
    for place, row in enumerate(queries + others):
        wanted = torch.stack([scale * targets[row] @ targets[other] for other in found]).softmax(0)
        scores = torch.stack([scale * cut[row] @ cut[other] for other in found]).log_softmax(0)
        divergences.append(-(wanted * scores).sum())
        if place < 4:
            infonce.append(-scores[found.index(own[row])])
    expected = sum(divergences) / 8 + 0.3 * sum(infonce) / 4
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_seed_gives_the_same_projections(tiny_model):
    one, again, other = (refined(tiny_model, seed=seed)[0].exit_projections[0].weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_joined_targets_have_the_mean_similarities(similarity):
    parts = [torch.randn(5, dim, generator=torch.Generator().manual_seed(dim)) for dim in (3, 8)]
    unit = [normalize(part, dim=-1) for part in parts] if similarity == "cosine" else parts
    joined = join_targets(parts, similarity)
    assert torch.allclose(joined @ joined.T, sum(part @ part.T for part in unit) / 2, atol=1e-5)


def test_wrong_arguments_are_refused(tiny_model):
    model, targets = tiny_model(), torch.zeros(len(TEXTS), 32)
    with pytest.raises(ValueError, match="encoder: it has no exit projections"):
        refine_exit_projections(model, TEXTS, targets, SIZES)
    model.add_exit_projections()
    with pytest.raises(ValueError, match=f"targets: there are 3 for {len(TEXTS)} texts"):
        refine_exit_projections(model, TEXTS, targets[:3], SIZES)


@pytest.mark.parametrize(("similarity", "width"), [("cosine", 32), ("dot", 32), ("cosine", 24)])
def test_a_rotation_brings_few_dims_nearer_and_keeps_the_largest(similarity, width, tiny_model):
    model = tiny_model()
    model.config.similarity = similarity
    model.add_exit_projections()
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(120, 32, generator=generator) * torch.linspace(1.5, 0.5, 32)]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rotate_last_exit(model, states[0], states[0], [8, 16, width], steps=60)
    last = model.exit_projections[3].weight.detach()
    states.append(states[0] @ last.T)  # the projection was the identity
    scale = SCALE if similarity == "cosine" else 1.0
    target = to_embeddings(states[0], 32, similarity).double()
    wanted = (scale * target[:60] @ target[60:].T).softmax(dim=-1)
    before, after = {}, {}
    for found, state in ((before, states[0]), (after, states[1])):
        for dim in (8, 16, width):
            cut = to_embeddings(state, dim, similarity).double()
            found[dim] = cut @ cut.T
            scores = (scale * cut[:60] @ cut[60:].T).log_softmax(dim=-1)
            found[f"divergence {dim}"] = (wanted * (wanted.log() - scores)).sum(dim=-1).mean().item()
    assert torch.allclose(before[width], after[width], atol=1e-5)
    first, then = (sum(found[f"divergence {dim}"] for dim in (8, 16)) for found in (before, after))
    assert then < 0.9 * first
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == {"exit_projections.3.weight"}
    assert torch.equal(last[width:], weights["exit_projections.3.weight"][width:])


def test_the_last_exit_is_cut_to_the_dims_of_the_ladder(tiny_model):
    model = tiny_model()
    assert dims_of_last_exit(model, SIZES) == [8, 16, 32]
    assert dims_of_last_exit(model, parse_ladder(["1x8", "2x32", "4x16"])) == [8, 16]
    assert dims_of_last_exit(model, parse_ladder(["1x8", "2x16"])) == []
