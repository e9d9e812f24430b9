"""Embeddings of a teacher: computed once, looked up by row, and the same training as with the teacher itself."""

import numpy as np
import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, teacher_embeddings
from trainer.data import PairCollator
from trainer.teacher_embeddings import (
    TargetCollator,
    TeacherEmbeddings,
    compute_teacher_embeddings,
    principal_directions,
)

ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})


def vectors_of(model, texts=SENTENCES) -> TeacherEmbeddings:
    return TeacherEmbeddings(texts, model.encode(list(texts)))


def make_trainer(model, folder, vectors, **kwargs) -> TwoDMSETrainer:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_tqdm": True, "teacher": "embeddings", "dropout": False,
        "embedding_weight": 2.0, "seed": 0,
    }  # fmt: skip
    more = {name: kwargs.pop(name) for name in ("guide",) if name in kwargs}
    args = TwoDMSETrainingArguments(output_dir=str(folder), **({"sizes": LADDER} | settings | kwargs))
    return TwoDMSETrainer(model=model, args=args, train_dataset=ROWS, teacher_embeddings=vectors, **more)


def test_each_row_gets_the_vector_of_its_text_with_its_prompt(tokenizer):
    texts = ["q: a man", "q: the cat", "d: a man", "d: rain", "d: she"]
    vectors = np.arange(10, dtype=np.float64).reshape(5, 2)
    teacher = TeacherEmbeddings(texts, vectors)
    columns = ["anchor", "positive", "negative"]
    prompts = {"anchor": "q: ", "positive": "d: ", "negative": "d: "}
    collator = TargetCollator(PairCollator(tokenizer, columns, 16, prompts=prompts), teacher)
    examples = [
        {"anchor": "the cat", "positive": "a man", "negative": None},
        {"anchor": "a man", "positive": "rain", "negative": "she"},
    ]
    batch = collator(examples)
    assert batch["targets"].dtype == torch.float32
    assert batch["targets"].tolist() == vectors[[1, 0, 2, 3, 4]].tolist()
    assert set(batch) - {"targets"} == set(collator.collator(examples))
    with pytest.raises(ValueError, match="teacher_embeddings: there is none for the training text 'q: rain'"):
        collator([{"anchor": "rain", "positive": "a man", "negative": None}])
    with pytest.raises(ValueError, match="vectors: there are 4 for 5 texts"):
        TeacherEmbeddings(texts, vectors[:4])


def test_pieces_are_written_once_and_an_interrupted_computation_continues(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_embeddings, "_PIECE", 6)
    model, encode, seen = tiny_model(), type(tiny_model()).encode, []

    def counted(self, texts, *args, **kwargs):
        seen.append(texts)
        if len(seen) == 3 and not (tmp_path / "go on").exists():
            raise KeyboardInterrupt
        return encode(self, texts, *args, **kwargs)

    expected = model.encode(SENTENCES, max_length=9)
    monkeypatch.setattr(type(model), "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        compute_teacher_embeddings(model, SENTENCES, tmp_path, "name", max_length=9)
    (folder,) = tmp_path.glob("teacher-*")
    assert len(list(folder.iterdir())) == 2
    (tmp_path / "go on").touch()
    found = compute_teacher_embeddings(model, SENTENCES, tmp_path, "name", max_length=9)
    assert seen[3] == SENTENCES[12:18], "the first two pieces are read"
    assert len(seen) == 5
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-6)
    assert (compute_teacher_embeddings(model, SENTENCES, tmp_path, "name", max_length=9) == found).all()
    assert len(seen) == 5
    for texts, name, length in ((SENTENCES[::-1], "name", 9), (SENTENCES, "other", 9), (SENTENCES, "name", 8)):
        compute_teacher_embeddings(model, texts, tmp_path, name, max_length=length)
    assert len(list(tmp_path.glob("teacher-*"))) == 4


def test_prompts_of_the_teacher_are_not_added(tiny_model, tmp_path):
    model = tiny_model()
    expected = model.encode(SENTENCES)
    model.config.prompts, model.config.default_prompt_name = {"query": "the cat "}, "query"
    assert np.abs(model.encode(SENTENCES) - expected).max() > 1e-3
    assert compute_teacher_embeddings(model, SENTENCES, tmp_path, "name") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("width", [5, 12, 20])
def test_principal_directions_are_those_of_numpy(width, monkeypatch):
    monkeypatch.setattr(teacher_embeddings, "_PIECE", 64)
    scales = np.linspace(4, 1, 12)
    vectors = (np.random.default_rng(0).normal(size=(200, 12)) * scales).astype(np.float32)
    found = principal_directions(vectors, width)
    assert (found.shape, found.dtype) == ((12, width), torch.float64)
    expected = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)[2].T[:, :width]
    kept = min(width, 12)
    assert np.abs((found.numpy()[:, :kept] * expected).sum(0)) == pytest.approx(1.0, abs=1e-9)
    assert found[:, kept:].abs().sum() == 0
    products = vectors.astype(np.float64) @ found.numpy()
    if width >= 12:
        assert products @ products.T == pytest.approx(vectors.astype(np.float64) @ vectors.T, abs=1e-3)


@pytest.mark.parametrize("more", [{}, {"gradient_cache_chunk_size": 3}])
def test_training_with_the_starts_own_vectors_equals_training_with_the_start(more, tiny_model, tmp_path):
    # Adam would make steps of full length of the rounding in gradients that are 0, as those of the keys' biases.
    settings = {"alignment_weight": 3.0, "optim": "sgd", **more}
    given, start = tiny_model(projected=True), tiny_model(projected=True)
    make_trainer(given, tmp_path / "a", vectors_of(given), **settings).train()
    make_trainer(start, tmp_path / "b", None, teacher="start", **settings).train()
    untrained = dict(tiny_model(projected=True).named_parameters())
    for name, value in given.named_parameters():
        torch.testing.assert_close(value, dict(start.named_parameters())[name], atol=1e-6, rtol=1e-5, msg=name)
    assert (given.exit_projections[0].weight - untrained["exit_projections.0.weight"]).abs().max() > 1e-3


def test_the_vectors_are_what_is_learnt(tiny_model, tmp_path):
    """Vectors that have nothing to do with the model: its full size comes nearer to them."""
    model, generator = tiny_model(projected=True), torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(20, 32, generator=generator), dim=-1).numpy()

    def cosine() -> float:
        return float((model.encode(SENTENCES[:16]) * vectors[:16]).sum(1).mean())

    before = cosine()
    make_trainer(model, tmp_path, TeacherEmbeddings(SENTENCES, vectors), embedding_weight=30.0, max_steps=20).train()
    assert cosine() > before + 0.2


@pytest.mark.parametrize("more", [{}, {"shallow_steps": 0.5}])
def test_a_resumed_run_equals_an_uninterrupted_one(more, tiny_model, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, **more}
    whole, resumed = tiny_model(), tiny_model()
    teacher = vectors_of(tiny_model())
    make_trainer(whole, tmp_path, teacher, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    make_trainer(resumed, tmp_path, teacher, **settings).train(resume_from_checkpoint=checkpoint)
    for name, value in whole.named_parameters():
        assert torch.equal(value, dict(resumed.named_parameters())[name]), name


def test_wrong_combinations_are_refused(tiny_model, tmp_path):
    teacher = vectors_of(tiny_model())
    with pytest.raises(ValueError, match="teacher: embeddings and the trainer's teacher_embeddings belong together"):
        make_trainer(tiny_model(), tmp_path, None)
    with pytest.raises(ValueError, match="teacher: embeddings and the trainer's teacher_embeddings belong together"):
        make_trainer(tiny_model(), tmp_path, teacher, teacher="start")
    with pytest.raises(ValueError, match="teacher: embeddings needs the alignment score_kl or query_kl"):
        make_trainer(tiny_model(), tmp_path, teacher, alignment="feature_kl")
    with pytest.raises(ValueError, match="guide: it cannot be used with teacher_embeddings"):
        make_trainer(tiny_model(), tmp_path, teacher, guide=tiny_model())
    with pytest.raises(ValueError, match="embedding_weight: the distance is that of unit vectors"):
        make_trainer(tiny_model(), tmp_path, teacher, similarity="dot")
    with pytest.raises(ValueError, match="embedding_weight: -1"):
        make_trainer(tiny_model(), tmp_path, teacher, embedding_weight=-1.0)


@pytest.mark.parametrize("more", [{}, {"gradient_cache_chunk_size": 3}, {"teacher": "start"}])
def test_shallow_steps_leave_the_deep_layers_alone(more, tiny_model, tmp_path):
    model, settings = tiny_model(projected=True), {"shallow_steps": 0.99, "sizes": ["1x8", "2x16", "4x32"], **more}
    before = {name: value.clone() for name, value in model.named_parameters()}
    teacher = None if "teacher" in more else vectors_of(model)
    make_trainer(model, tmp_path, teacher, **settings).train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"exit_projections.0.weight", "backbone.encoder.layer.0.output.dense.weight"} <= changed
    assert not any(".layer.3." in name or "projections.3." in name for name in changed)


def test_shallow_steps_that_cannot_be_are_refused(tiny_model, tmp_path):
    teacher = vectors_of(tiny_model())
    with pytest.raises(ValueError, match=r"shallow_steps: 1\.0 is not allowed; use a number from 0 to below 1"):
        make_trainer(tiny_model(), tmp_path, teacher, shallow_steps=1.0)
    with pytest.raises(ValueError, match="shallow_steps: they need the objective starbucks and the teacher start or"):
        make_trainer(tiny_model(), tmp_path, None, teacher="largest", shallow_steps=0.5, embedding_weight=0.0)
    with pytest.raises(ValueError, match="shallow_steps: no size has at most 2 layers, two thirds of the model's"):
        make_trainer(tiny_model(), tmp_path, teacher, shallow_steps=0.5, sizes=["3x8", "4x32"])
