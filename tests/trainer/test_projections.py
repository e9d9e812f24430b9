"""Exit projections: fitted as in a simple reference, trained, resumed and averaged with the other weights."""

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset
from torch.nn.functional import normalize

from modeling_2dmse import TwoDMSEModel, parse_ladder
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.data import draw_texts
from trainer.projections import fit_exit_projections
from trainer.refining import join_targets, refine_exit_projections

TEXTS = [f"{a} {b}" for a in SENTENCES for b in SENTENCES[:8]]
ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})


def train(model, folder, resume=None, **kwargs) -> TwoDMSETrainer:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_tqdm": True, "sizes": LADDER, "exit_projections": True,
    }  # fmt: skip
    args = TwoDMSETrainingArguments(output_dir=str(folder), **(settings | kwargs))
    trainer = TwoDMSETrainer(model=model, args=args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_the_fit_equals_a_simple_reference(family, tiny_model, monkeypatch):
    monkeypatch.setattr("trainer.projections._PIECE", 50)
    model, ridge = tiny_model(family), 0.1
    model.pool_all_tokens()  # as the fit does: qwen3 takes the last token
    states = model.encode_states(TEXTS, batch_size=len(TEXTS)).double()
    fit_exit_projections(model, TEXTS, ridge)
    target = normalize(states[-1], dim=-1)
    directions = torch.linalg.svd(target, full_matrices=False)[2].T
    after = model.encode_states(TEXTS).double()
    for n in range(3):
        x = states[n]
        penalty = (ridge * (x**2).sum() / x.shape[1]).sqrt()
        rows = torch.cat((x, penalty * torch.eye(x.shape[1])))
        wanted = torch.cat((target @ directions, torch.zeros(x.shape[1], x.shape[1])))
        expected = x @ torch.linalg.lstsq(rows, wanted).solution
        strong = slice(0, 8)  # weak directions differ only by rounding
        signs = (after[n] * expected).sum(0).sign()
        assert torch.allclose(after[n][:, strong], (signs * expected)[:, strong], atol=1e-4)
        assert expected[:, strong].abs().max() > 0.1


def test_the_full_size_keeps_its_cosines_and_small_sizes_get_closer(tiny_model):
    def cosines(model, n, d):
        embeddings = torch.from_numpy(model.encode(TEXTS, n, d))
        return embeddings @ embeddings.T

    plain, fitted = tiny_model(), tiny_model()
    fit_exit_projections(fitted, TEXTS)
    full = cosines(plain, 4, 32)
    assert torch.allclose(cosines(fitted, 4, 32), full, atol=1e-5)
    for n, d in ((1, 8), (2, 16), (3, 32), (4, 8)):
        pairs = [torch.stack((cosines(model, n, d).flatten(), full.flatten())) for model in (plain, fitted)]
        before, after = (torch.corrcoef(pair)[0, 1] for pair in pairs)
        assert after > before + 0.05, (n, d, before, after)


def test_fitting_a_reloaded_model_again_gives_the_same(tiny_model, tmp_path):
    model = tiny_model()
    fit_exit_projections(model, TEXTS)
    model.save_pretrained(tmp_path)
    again = TwoDMSEModel.from_pretrained(tmp_path)
    fit_exit_projections(again, TEXTS)
    for old, new in zip(model.exit_projections, again.exit_projections, strict=True):
        torch.testing.assert_close(old.weight.data, new.weight.data)


def test_wrong_texts_are_refused_before_anything_changes(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="texts: there are none; give some thousands"):
        fit_exit_projections(model, [])
    with pytest.raises(ValueError, match="texts: item 1 is a int; every text must be a string"):
        fit_exit_projections(model, ["a", 1])
    assert model.exit_projections is None


def test_new_projections_change_no_embedding(tiny_model):
    plain, projected = tiny_model(), tiny_model()
    projected.add_exit_projections()
    assert (plain.encode(SENTENCES, 2, 8) == projected.encode(SENTENCES, 2, 8)).all()
    weights = projected.exit_projections[0].weight
    projected.add_exit_projections()
    assert projected.exit_projections[0].weight is weights, "existing projections are kept"


def test_projections_train_and_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path):
    fitted = tiny_model()
    fit_exit_projections(fitted, draw_texts([ROWS], 0))
    whole, part, resumed = tiny_model(), tiny_model(), tiny_model()
    settings = {"save_strategy": "steps", "save_steps": 2, "seed": 0, "initial_share": 0.5}
    train(whole, tmp_path / "whole", **settings)
    train(part, tmp_path / "part", **settings)
    train(resumed, tmp_path / "part", str(tmp_path / "part" / "checkpoint-2"), **settings)
    for n in (0, 1, 3):
        start, trained = fitted.exit_projections[n].weight, whole.exit_projections[n].weight
        assert (trained - start).abs().max() > 1e-3
        assert torch.equal(trained, resumed.exit_projections[n].weight)
    assert whole.config.exit_projections
    again = whole.exit_projections[2].weight.clone()
    assert (again - fitted.exit_projections[2].weight).abs().max() > 1e-3
    fit_exit_projections(whole, draw_texts([ROWS], 0), layers=[3])
    torch.testing.assert_close(whole.exit_projections[2].weight.data, again.data)


@pytest.mark.parametrize("teacher", ["start", "largest"])
def test_shallow_exits_are_refined_after_training(teacher, tiny_model, tmp_path):
    settings = {"refine_projections": True, "save_strategy": "steps", "save_steps": 2, "seed": 0, "teacher": teacher}
    start, plain, whole, resumed = (tiny_model() for _ in range(4))
    texts = draw_texts([ROWS], 0)
    fit_exit_projections(start, texts)
    train(plain, tmp_path / "plain", seed=0, teacher=teacher)
    train(whole, tmp_path / "whole", **settings)
    train(resumed, tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-2"), **settings)
    last, turned = (model.exit_projections[3].weight.double() for model in (plain, whole))
    assert torch.allclose(turned.T @ turned, last.T @ last, atol=1e-4), "the last exit is only rotated"
    assert not torch.allclose(turned, last)
    targets = [model.encode_states(texts, [4])[0] for model in ([plain, start] if teacher == "start" else [plain])]
    refine_exit_projections(plain, texts, join_targets(targets, "cosine"), parse_ladder(LADDER), seed=0)
    assert torch.equal(whole.exit_projections[3].weight, resumed.exit_projections[3].weight)
    for n in (0, 1):
        assert torch.equal(whole.exit_projections[n].weight, resumed.exit_projections[n].weight)
        torch.testing.assert_close(whole.exit_projections[n].weight.data, plain.exit_projections[n].weight.data)


def test_refining_without_use_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="refine_projections: the model has no exit projections; add --exit_proj"):
        train(tiny_model(), tmp_path, refine_projections=True, exit_projections=False)
    with pytest.raises(ValueError, match="refine_projections: 4x32 alone is learned from and has nothing to learn"):
        train(tiny_model(), tmp_path, refine_projections=True, sizes=["4x32"])


def test_sizes_with_all_layers_are_refined_by_a_rotation(tiny_model, tmp_path):
    settings = {"sizes": ["4x8", "4x32"], "seed": 0, "max_steps": 1}
    models = [tiny_model(), tiny_model()]
    for model, refined in zip(models, (False, True), strict=True):
        train(model, tmp_path / str(refined), refine_projections=refined, **settings)
    plain, refined = (model.encode(SENTENCES) for model in models)
    torch.testing.assert_close(torch.tensor(plain @ plain.T), torch.tensor(refined @ refined.T), atol=1e-5, rtol=0)
    few = [rows[:, :8] @ rows[:, :8].T for rows in (plain, refined)]
    assert abs(few[0] - few[1]).max() > 1e-3


def test_the_last_exit_keeps_its_share_of_the_fit(tiny_model, tmp_path):
    fitted, model = tiny_model(), tiny_model()
    fit_exit_projections(fitted, draw_texts([ROWS], 42))
    train(model, tmp_path, initial_share=1.0)
    assert torch.allclose(model.exit_projections[3].weight, fitted.exit_projections[3].weight, atol=1e-6)
    assert not torch.allclose(model.exit_projections[0].weight, fitted.exit_projections[0].weight, atol=1e-3)


def test_existing_projections_are_trained_further(tiny_model, tmp_path):
    model = tiny_model(projected=True)
    before = [projection.weight.clone() for projection in model.exit_projections]
    train(model, tmp_path, learning_rate=1e-5)
    for old, new in zip(before, model.exit_projections, strict=True):
        torch.testing.assert_close(old, new.weight.data, atol=1e-3, rtol=0)


def test_adapters_come_after_the_fit(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="exit_projections: fit them before adding adapters"):
        train(adapted, tmp_path)
    encoder = tiny_model()
    fit_exit_projections(encoder, TEXTS)
    before = encoder.exit_projections[0].weight.clone()
    trainer = train(get_peft_model(encoder, LoraConfig(target_modules="all-linear")), tmp_path)
    merged = trainer.model.merge_and_unload()
    assert not torch.allclose(merged.exit_projections[0].weight, before, atol=1e-4)


def test_drawn_texts_depend_on_the_seed_and_differ():
    rows = Dataset.from_dict({"anchor": ["a", "b", "a"], "positive": ["b", "c", "d"], "negative_1": ["", "e", None]})
    assert sorted(draw_texts([rows, rows], 0)) == ["a", "b", "c", "d", "e"]
    assert draw_texts([rows], 0, 3) == draw_texts([rows], 0, 3)
    assert len({tuple(draw_texts([rows], seed, 3)) for seed in range(9)}) > 1
    assert all(len(draw_texts([rows], seed, 2)) == 2 for seed in range(9))


@pytest.mark.parametrize("given", [False, True])
def test_kept_states_are_those_after_the_fit(tiny_model, given):
    model = tiny_model()
    targets = torch.randn(len(SENTENCES), model.config.hidden_size) if given else None
    kept = fit_exit_projections(model, SENTENCES, targets=targets, keep_states=True)
    then = model.encode_states(SENTENCES)
    torch.testing.assert_close(kept[:-1], then[:-1], atol=1e-4, rtol=1e-4)
    last = then[-1] if given else torch.nn.functional.normalize(then[-1], dim=-1)
    torch.testing.assert_close(kept[-1], last, atol=1e-4, rtol=1e-4)
    assert fit_exit_projections(model, SENTENCES) is None
