"""Training for retrieval: prompts, lengths, dot products, a teacher's scores and a guide."""

import json
import math
import random

import pytest
import torch
from conftest import LADDER, SENTENCES, TAUGHT, TRIPLETS
from datasets import Dataset

from modeling_2dmse import TwoDMSEModel, parse_ladder
from modeling_2dmse.pooling import cut_and_normalize
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, step_loss
from trainer.data import PairCollator, check_table, join_tables
from trainer.evaluation import RetrievalData, StsData, evaluate_retrieval, evaluate_sts
from trainer.losses import Rows, base_loss
from trainer.objectives import Objective
from trainer.step_loss import plan_loss

SETTINGS = {"bf16": False, "use_cpu": True, "report_to": "none", "eval_strategy": "no", "load_best_model_at_end": False}


def make_trainer(model, folder, rows=TRIPLETS, guide=None, **settings) -> TwoDMSETrainer:
    settings = SETTINGS | {"sizes": LADDER, "seed": 3, "per_device_train_batch_size": 6} | settings
    args = TwoDMSETrainingArguments(output_dir=str(folder), **settings)
    trainer = TwoDMSETrainer(model, args, Dataset.from_dict(rows), guide=guide)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(x, y) -> float:
    return float(sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)))


# Three anchors; the second has no negative in the last column.
OWNERS, TEACHER = [0, 1, 2, 0, 1, 2, 0, 2], [4.0, 1.0, 3.0, 1.0, 2.0, -1.0, 0.5, 2.5]
TAUGHT_ROWS = Rows((3, 3, 3, 2), teacher_scores=torch.tensor(TEACHER), owners=torch.tensor(OWNERS))


def test_margin_mse():
    x = vectors(11, 6, 0)
    anchors, candidates = x[:3], x[3:]
    errors = []
    for number in range(3, 8):
        owner = OWNERS[number]
        margin = 2.0 * (dot(anchors[owner], candidates[owner]) - dot(anchors[owner], candidates[number]))
        errors.append((margin - (TEACHER[owner] - TEACHER[number])) ** 2)
    expected = sum(errors) / 5
    assert base_loss("margin_mse", x, TAUGHT_ROWS, scale=2.0).item() == pytest.approx(expected, abs=1e-10)
    alone = Rows((3, 3), teacher_scores=torch.tensor(TEACHER[:3]), owners=torch.tensor(OWNERS[:3]))
    assert base_loss("margin_mse", x[:6], alone).item() == 0, "without negatives there is no margin"


def test_distill_kl():
    x = vectors(11, 6, 0)
    anchors, candidates = x[:3], x[3:]
    expected = 0.0
    for anchor in range(3):
        own = [number for number in range(8) if OWNERS[number] == anchor]
        assert len(own) == (2 if anchor == 1 else 3)
        student = [2.0 * dot(anchors[anchor], candidates[number]) for number in own]
        teacher = [TEACHER[number] for number in own]
        shares = [[math.exp(v) / sum(map(math.exp, side)) for v in side] for side in (teacher, student)]
        expected += sum(p * math.log(p / q) for p, q in zip(*shares, strict=True)) / 3
    assert expected > 0.01
    assert base_loss("distill_kl", x, TAUGHT_ROWS, scale=2.0).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("loss", ["margin_mse", "distill_kl"])
def test_gradients_of_the_teacher_losses(loss):
    x = vectors(11, 6, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: base_loss(loss, x, TAUGHT_ROWS, scale=0.5), x)
    base_loss(loss, x, TAUGHT_ROWS, scale=0.5).backward()
    assert x.grad.abs().max() > 1e-3


def test_query_kl_aligns_the_scores_of_queries_and_documents():
    from trainer.alignment import query_kl

    s, t = vectors(7, 4, 0), vectors(7, 6, 1)
    expected = 0.0
    for query in range(3):
        student, teacher = ([0.5 * dot(side[query], side[3 + d]) for d in range(4)] for side in (s, t))
        shares = [[math.exp(v) / sum(map(math.exp, side)) for v in side] for side in (teacher, student)]
        expected += sum(p * math.log(p / q) for p, q in zip(*shares, strict=True)) / 3
    assert expected > 0.01
    s, t = s.requires_grad_(), t.requires_grad_()
    value = query_kl(s, t, 3, scale=0.5)
    assert value.item() == pytest.approx(expected, abs=1e-10)
    value.backward()
    assert s.grad.abs().max() > 1e-3
    assert t.grad is None


GENERATOR = torch.Generator().manual_seed(0)
STATES = torch.randn(4, 24, 32, generator=GENERATOR)
ROLES = {
    "infonce": Rows((8, 8, 5), unlabeled=3, guide=torch.randn(21, 5, generator=GENERATOR)),
    "taught": Rows(
        (8, 8, 5),
        unlabeled=3,
        teacher_scores=3 * torch.randn(13, generator=GENERATOR),
        owners=torch.tensor([*range(8), 0, 2, 3, 5, 7]),
    ),
}


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("alignment", ["score_kl", "query_kl", "feature_kl"])
@pytest.mark.parametrize("loss", ["infonce", "margin_mse", "distill_kl"])
def test_at_once_equals_one_after_another(loss, alignment, similarity, monkeypatch):
    """For infonce with a guide, and the losses with a teacher's scores, of cosines and of dot products."""
    rows = ROLES["infonce" if loss == "infonce" else "taught"]
    teacher = "largest" if alignment == "feature_kl" else "start"
    more = {"similarity": similarity, "teacher": teacher, "unlabeled_weight": 0.5, "cross_size_weight": 0.3}
    plan = Objective("starbucks", parse_ladder(LADDER), 4, 32, alignment=alignment, **more).plan(random.Random(0))
    start = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) if teacher == "start" else None
    states, results = STATES[[n - 1 for n in plan.layers]], []
    for at_once in (True, False):
        monkeypatch.setattr(step_loss, "fits_stacked", lambda *_, at_once=at_once: at_once)
        results.append(step_loss.plan_gradient(plan, states, rows, loss, 1.0, start))
    (total, parts, slopes), (expected, expected_parts, expected_slopes) = results
    assert set(parts) == set(expected_parts)
    assert {f"alignment/{size}" for size in LADDER[:2]} <= set(parts)
    assert expected_slopes.abs().max() > 1e-3
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(slopes, expected_slopes, atol=1e-5, rtol=1e-4)


def test_dot_products_are_of_vectors_that_are_not_normalised():
    plans = [Objective("matryoshka", parse_ladder(["4x8"]), 4, 32, similarity=s) for s in ("cosine", "dot")]
    rows, states = Rows((8, 8, 8)), STATES[3:]
    cosine, dots = (plan_loss(plan.plan(random.Random(0)), states, rows, "infonce", 1.0)[0] for plan in plans)
    for value, embeddings in ((cosine, cut_and_normalize(states[0], 8)), (dots, states[0, :, :8])):
        scores = embeddings[:8] @ embeddings[8:].T
        torch.testing.assert_close(value, torch.nn.functional.cross_entropy(scores, torch.arange(8)))
    assert abs(cosine - dots) > 0.1


def test_collator_puts_prompts_before_the_columns_and_cuts_them_to_their_lengths(tokenizer):
    prompts = {"anchor": "a man ", "positive": "the cat ", "negative": "the cat "}
    examples = [{"anchor": SENTENCES[i], "positive": SENTENCES[0], "negative": SENTENCES[i + 4]} for i in (0, 1)]
    plain = PairCollator(tokenizer, list(prompts), 9)(examples)
    for remember in (False, True):
        more = {"prompts": prompts, "max_first_length": 5, "remember": remember}
        collator = PairCollator(tokenizer, list(prompts), 9, **more)
        for _ in range(2):
            batch = collator(examples)
            texts = [prompts[column] + example[column] for column in prompts for example in examples]
            for row, text in enumerate(texts):
                expected = tokenizer(text, truncation=True, max_length=5 if row < 2 else 9)["input_ids"]
                assert batch["lengths"][row] == len(expected)
                assert batch["input_ids"][row, : len(expected)].tolist() == expected
    assert plain["lengths"] != batch["lengths"]


def test_collator_numbers_the_scores_of_a_teacher(tokenizer):
    table = check_table(Dataset.from_dict(TAUGHT))
    assert table.column_names[:4] == list(TRIPLETS)
    batch = PairCollator(tokenizer, list(TRIPLETS), 9)([table[0], table[1], table[3]])
    assert batch["counts"] == (3, 3, 3, 2)
    assert batch["owners"].tolist() == [0, 1, 2, 0, 1, 2, 0, 2]
    expected = [5.0, 4.7, 4.1, -2.0, -1.5, -0.5, 1.5, 2.1]
    torch.testing.assert_close(batch["teacher_scores"], torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_score": None}, "columns positive_score, negative_1_score, but no negative_score"),
        ({"negative_score": ["high"] * 12}, "train_file: column negative_score must hold numbers"),
        ({"positive_score": [float("nan")] * 12}, "column positive_score holds 12 values that are not finite numbers"),
        ({"negative_1_score": [None] * 12}, "column negative_1_score holds 4 values that are not finite numbers"),
    ],
)
def test_tables_with_wrong_scores_of_a_teacher(change, message):
    columns = {name: values for name, values in (TAUGHT | change).items() if values is not None}
    with pytest.raises(ValueError, match=message):
        check_table(Dataset.from_dict(columns))


def test_scores_of_a_teacher_are_read_from_csv_with_empty_cells(tmp_path):
    from trainer.shared.tables import read_table

    Dataset.from_dict(TAUGHT).to_csv(tmp_path / "t.csv", index=False)
    table = check_table(read_table(str(tmp_path / "t.csv")))
    assert table["negative_1_score"][:1] == [1.5]
    assert math.isnan(table["negative_1_score"][1])
    with pytest.raises(ValueError, match="files with a teacher's scores and files without"):
        join_tables([table, check_table(Dataset.from_dict(TRIPLETS))])


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (TRIPLETS, {"loss": "margin_mse"}, "loss: margin_mse does not fit the columns"),
        (TAUGHT, {"loss": "cosent"}, "loss: cosent does not fit .*; use distill_kl or margin_mse or infonce"),
        (TAUGHT, {"similarity": "euclidean"}, "similarity: 'euclidean' is unknown; choose one of cosine, dot"),
        (TAUGHT, {"max_query_length": 2}, "max_query_length: 2 is not allowed; use a number of at least 3"),
    ],
)
def test_refused_settings(rows, settings, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_model(), tmp_path, rows, **settings)


def test_what_needs_anchors_or_cosines_is_refused(tiny_model, tmp_path):
    scored = {"sentence1": SENTENCES[:12], "sentence2": SENTENCES[4:16], "score": [0.1 * i for i in range(12)]}
    for settings, message in (
        ({"query_prompt": "q: "}, "query_prompt: the columns .* have no queries"),
        ({"max_query_length": 8}, "max_query_length: the columns .* have no queries"),
        ({"loss": "cosine_mse", "similarity": "dot"}, "loss: cosine_mse needs similarity cosine"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tiny_model(), tmp_path, scored, **settings)
    with pytest.raises(
        ValueError, match="guide: only infonce has false negatives to leave out, but the loss is cosent"
    ):
        make_trainer(tiny_model(), tmp_path, scored, guide=tiny_model())
    model = tiny_model()
    model.config.similarity = "dot"
    with pytest.raises(ValueError, match="similarity: this model compares embeddings by dot; pass dot to keep it"):
        make_trainer(model, tmp_path)


@pytest.mark.parametrize("loss", ["margin_mse", "distill_kl", "infonce"])
def test_a_step_of_the_trainer(loss, tiny_model, tmp_path):
    """The loss of a step, without and with a cache, is that of the states of the prompted and cut texts."""
    settings = {"loss": loss, "similarity": "dot", "query_prompt": "a man ", "max_query_length": 6, "dropout": False}
    results = []
    for chunk in (None, 2):
        model = tiny_model()
        trainer = make_trainer(model, tmp_path, TAUGHT, gradient_cache_chunk_size=chunk, **settings)
        assert trainer.args.loss_scale == 1
        model.zero_grad()
        loss_value = trainer.training_step(model, trainer.data_collator([trainer.train_dataset[i] for i in range(6)]))
        results.append(
            (loss_value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (value, slopes), (cached, cached_slopes) = results
    texts = ["a man " + text for text in SENTENCES[:6]]
    queries = model.encode_states(texts, (1, 2, 4), max_length=6)
    others = [text for column in list(TRIPLETS)[1:] for text in TRIPLETS[column][:6] if text]
    states = torch.cat((queries, model.encode_states(others, (1, 2, 4))), dim=1)
    owners = torch.tensor([*range(6), *range(6), 0, 3])
    scores = torch.tensor([TAUGHT[c][i] for c in ("positive_score", "negative_score") for i in range(6)] + [1.5, 2.1])
    taught = {} if loss == "infonce" else {"teacher_scores": scores, "owners": owners}
    plan = trainer.training_objective.plan(random.Random(0))
    expected, _ = plan_loss(plan, states, Rows((6, 6, 6, 2), **taught), loss, 1.0)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert cached == pytest.approx(value, rel=1e-5)
    assert max(slope.abs().max() for slope in slopes.values()) > 1e-3
    for name, slope in slopes.items():
        torch.testing.assert_close(cached_slopes[name], slope, atol=1e-4 * max(1.0, slope.abs().max()), rtol=1e-3)


def test_prompts_and_similarity_are_saved_and_used(tiny_model, tmp_path):
    """By encode, by sentence-transformers, and by the evaluation of retrieval, but not by that of STS."""
    from sentence_transformers import SentenceTransformer

    settings = {"query_prompt": "a man ", "document_prompt": "the cat ", "similarity": "dot", "max_query_length": 7}
    trainer = make_trainer(tiny_model(), tmp_path, max_steps=1, exit_projections=True, **settings)
    trainer.train()
    trainer.save_model()
    model = TwoDMSEModel.from_pretrained(tmp_path)
    assert model.config.prompts == {"query": "a man ", "document": "the cat "}
    assert model.config.similarity == "dot"
    for name, prompt in model.config.prompts.items():
        got = model.encode(SENTENCES, prompt_name=name)
        assert got == pytest.approx(model.encode([prompt + text for text in SENTENCES]), abs=1e-5)
    assert got.std() > 0.01
    assert abs((got**2).sum(axis=1) - 1).max() > 0.1, "the vectors are not normalised"
    assert model.encode(SENTENCES, dim=8, prompt_name=name) == pytest.approx(got[:, :8], abs=1e-5)
    theirs = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert theirs.similarity_fn_name == "dot"
    assert theirs.encode(SENTENCES, prompt_name=name) == pytest.approx(got, abs=1e-4)
    folder = model.truncate(2, 8).export(tmp_path / "small", format="transformers")
    exported = SentenceTransformer(folder, device="cpu")
    assert exported.similarity_fn_name == "dot"
    assert exported.encode(SENTENCES) == pytest.approx(model.encode(SENTENCES, 2, 8), abs=1e-4)
    with pytest.raises(ValueError, match="precision: int8 needs unit vectors, but this model"):
        model.encode(SENTENCES, precision="int8")
    assert {"similarity": "dot", "query prompt": "a man "}.items() <= trainer.describe().items()

    calls = []
    encode_states = model.encode_states
    model.encode_states = lambda texts, *args, **kwargs: calls.append(kwargs) or encode_states(texts, *args, **kwargs)
    data = RetrievalData("r", {"q": SENTENCES[0]}, {str(i): text for i, text in enumerate(SENTENCES)}, {"q": {"3": 1}})
    results = evaluate_retrieval(model, data, parse_ladder(["4x32"]), max_length=9, max_query_length=7)
    assert [(call["prompt"], call["max_length"]) for call in calls] == [("a man ", 7), ("the cat ", 9)]
    scores = model.encode(SENTENCES, prompt_name="document", max_length=9) @ model.encode(
        SENTENCES[0], prompt_name="query", max_length=7
    )
    rank = int((scores > scores[3]).sum()) + 1
    assert results["mrr@10"]["4x32"] == pytest.approx(1 / rank if rank <= 10 else 0)
    evaluate_sts(model, StsData("s", SENTENCES[:3], SENTENCES[3:6], [0.1, 0.5, 0.9]), parse_ladder(["4x32"]))
    assert "prompt" not in calls[-1]


def test_onnx_gives_vectors_that_are_not_normalised(tiny_model, tmp_path):
    pytest.importorskip("onnxruntime")
    from run_scripts.export import onnx_encoder

    model = tiny_model()
    model.config.similarity = "dot"
    folder = model.export(tmp_path / "onnx", num_layers=2, dim=8, format="onnx")
    got = onnx_encoder(folder)(SENTENCES)
    assert got == pytest.approx(model.encode(SENTENCES, 2, 8), abs=1e-4)
    assert abs((got**2).sum(axis=1) - 1).max() > 0.1


def test_an_index_of_dot_products_is_refused(tiny_model, tmp_path, capsys):
    from run_scripts import build_index, encode

    model = tiny_model()
    model.config.similarity = "dot"
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--input", str(tmp_path / "texts.txt")]
    with pytest.raises(SystemExit, match="2"):
        encode.main([*flags, "--output_dir", str(tmp_path / "e8"), "--precision", "int8"])
    assert "precision: int8 needs unit vectors" in capsys.readouterr().err
    encode.main([*flags, "--output_dir", str(tmp_path / "e")])
    assert json.loads((tmp_path / "e" / "embeddings.json").read_text())["similarity"] == "dot"
    with pytest.raises(SystemExit, match="2"):
        build_index.main(["--embeddings", str(tmp_path / "e"), "--output_dir", str(tmp_path / "index")])
    assert capsys.readouterr().err.strip().endswith("compares by dot product; an index has cosines only")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("loss", "peer"), [("margin_mse", "MarginMSELoss"), ("distill_kl", "DistillKLDivLoss")])
def test_the_teacher_losses_equal_those_of_sentence_transformers(loss, peer):
    from sentence_transformers.sentence_transformer import losses

    x, scores = vectors(16, 6, 0), vectors(4, 3, 1)
    theirs = getattr(losses, peer)(None).compute_loss_from_embeddings(list(x.split(4)), scores)
    rows = Rows((4, 4, 4, 4), teacher_scores=scores.T.flatten(), owners=torch.arange(4).repeat(3))
    assert theirs > 0.1
    torch.testing.assert_close(base_loss(loss, x, rows, scale=1.0), theirs)
