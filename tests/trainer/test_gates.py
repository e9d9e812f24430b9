"""Gates of exits: fitted alone, trained with the rest, and left alone where the full size ends."""

from functools import partial

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset

from modeling_2dmse import TwoDMSEModel, parse_ladder
from modeling_2dmse.encoding import to_embeddings
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments, exits, fit_exit_gates, fit_exit_projections, gates
from trainer.alignment import query_kl
from trainer.averaging import initial_shares
from trainer.exits import keep_last_gate
from trainer.refining import SCALE, divergence

TEXTS = [f"{a} and {b}" for a in SENTENCES for b in SENTENCES[:6]]
SIZES = parse_ladder(["1x8", "2x8", "2x16", "4x32"])
ROWS = Dataset.from_dict({"anchor": TEXTS[:40], "positive": TEXTS[40:80]})


def fitted(tiny_model, **kwargs):
    model = tiny_model()
    fit_exit_projections(model, TEXTS)
    targets = torch.from_numpy(model.encode(TEXTS))
    fit_exit_gates(model, TEXTS, targets, SIZES, **{"steps": 40, **kwargs})
    return model, targets


def distance(model, targets, size) -> float:
    """The divergence of all texts' similarities to all others at a size from those of the targets."""
    student = torch.from_numpy(model.encode(TEXTS, num_layers=size.num_layers, dim=size.dim))
    return query_kl(student, targets, len(TEXTS) // 2, SCALE).item()


def test_gates_bring_every_size_of_the_ladder_nearer_to_the_targets(tiny_model):
    model, targets = fitted(tiny_model)
    fit_exit_projections(model, TEXTS, layers=range(1, 4))
    gates = [gate.weight.detach().clone() for gate in model.exit_gates]
    found = [distance(model, targets, size) for size in SIZES]
    for gate in model.exit_gates:
        gate.reset()
    fit_exit_projections(model, TEXTS, layers=range(1, 4))
    without = [distance(model, targets, size) for size in SIZES]
    assert all(new < old for new, old in zip(found[:3], without[:3], strict=True)), (found, without)
    assert found[3] == pytest.approx(without[3], abs=1e-6), "the full size does not change"
    assert [bool(gate.any()) for gate in gates] == [True, True, False, False], "exits below the last one, on the ladder"


def test_nothing_but_the_gates_and_projections_of_the_sizes_changes(tiny_model):
    model = tiny_model()
    fit_exit_projections(model, TEXTS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_exit_gates(model, TEXTS, torch.from_numpy(model.encode(TEXTS)), SIZES, steps=3)
    after = model.state_dict()
    changed = {f"exit_projections.{n - 1}.weight" for n in {size.num_layers for size in SIZES} - {4}}
    assert {name for name, value in before.items() if not torch.equal(after[name], value)} == changed
    assert set(after) - set(before) == {f"exit_gates.{n}.weight" for n in range(4)}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_seed_gives_the_same_gates(tiny_model):
    one, again, other = (fitted(tiny_model, seed=seed)[0].exit_gates[0].weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("factor", [8.0, 1e-9, 1e9])
def test_states_of_another_scale_give_the_same_weights(factor, tiny_model, monkeypatch):
    """Adam's steps have one length, whatever the scale of the states, and float16 holds states of any scale."""
    small, targets = fitted(tiny_model, steps=10)
    start = tiny_model()
    fit_exit_projections(start, TEXTS)
    states_of = TwoDMSEModel.token_states
    monkeypatch.setattr(TwoDMSEModel, "token_states", lambda *given: [factor * state for state in states_of(*given)])
    large = tiny_model()
    fit_exit_projections(large, TEXTS)
    for own, other in zip(large.exit_projections[:-1], start.exit_projections[:-1], strict=True):
        own.weight.data.copy_(other.weight.data / factor)
    fit_exit_gates(large, TEXTS, targets, SIZES, steps=10)
    for modules, others in ((large.exit_gates, small.exit_gates), (large.exit_projections, small.exit_projections)):
        assert torch.allclose(factor * modules[0].weight, others[0].weight, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_divergence_is_that_of_the_softmax_of_similarities(similarity):
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(10, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    targets = torch.randn(10, 8, generator=generator, dtype=torch.float64)
    targets = to_embeddings(targets, 8, similarity).double()
    scale, expected = SCALE if similarity == "cosine" else 1.0, 0.0
    for output, dims in zip(outputs, ([2, 6], [4]), strict=True):
        for dim in dims:
            vectors = [row[:dim] / (row[:dim].norm() if similarity == "cosine" else 1) for row in output]
            for query in range(5):
                wanted = torch.stack([scale * targets[query] @ targets[other] for other in range(5, 10)]).softmax(0)
                found = torch.stack([scale * vectors[query] @ vectors[other] for other in range(5, 10)])
                expected -= (wanted * found.log_softmax(0)).sum() / 5
    got = divergence(outputs, targets, [[2, 6], [4]], similarity)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_wrong_arguments_are_refused(tiny_model):
    model, targets = tiny_model(), torch.zeros(len(TEXTS), 32)
    with pytest.raises(ValueError, match="encoder: it has no exit projections"):
        fit_exit_gates(model, TEXTS, targets, SIZES)
    model.add_exit_projections()
    with pytest.raises(ValueError, match=f"targets: there are 3 for {len(TEXTS)} texts"):
        fit_exit_gates(model, TEXTS, targets[:3], SIZES)


def test_states_of_zero_leave_a_gate_neutral(tiny_model, monkeypatch):
    states_of = TwoDMSEModel.token_states
    monkeypatch.setattr(TwoDMSEModel, "token_states", lambda *given: [0 * state for state in states_of(*given)])
    model = tiny_model()
    model.add_exit_projections()
    fit_exit_gates(model, TEXTS, torch.eye(len(TEXTS)), SIZES, steps=3)
    assert all(gate.is_neutral for gate in model.exit_gates)


def test_offloaded_gates_are_refused(tiny_model):
    model = tiny_model(projected=True, gated=True)
    model.exit_gates.to("meta")
    with pytest.raises(ValueError, match="encoder: its exit gates are offloaded"):
        fit_exit_gates(model, TEXTS, torch.zeros(len(TEXTS), 32), SIZES)


def test_only_a_neutral_last_gate_is_left_out_of_training(tiny_model):
    model, _ = fitted(tiny_model, steps=2)
    cut = model.truncate(2)
    for encoder, trained in ((model, [True, True, True, False]), (cut, [True, True])):
        keep_last_gate(encoder)
        assert [gate.weight.requires_grad for gate in encoder.exit_gates] == trained


def test_gates_have_the_share_of_their_layer_in_the_average(tiny_model):
    model, _ = fitted(tiny_model, steps=2)
    shares = initial_shares(model, 0.6)
    assert [shares[f"exit_gates.{n}.weight"] for n in range(4)] == pytest.approx([0, 0.2, 0.4, 0.6])


def trainer_of(model, folder, **kwargs) -> TwoDMSETrainer:
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 8,
                "max_steps": 4, "save_steps": 2, "bf16": False, "disable_tqdm": True, "sizes": LADDER, "seed": 0,
                "exit_projections": True, "exit_gates": True, "learning_rate": 1e-3}  # fmt: skip
    args = TwoDMSETrainingArguments(**{**settings, **kwargs})
    return TwoDMSETrainer(model=model, args=args, train_dataset=ROWS)


def test_the_trainer_fits_gates_and_a_resumed_run_has_the_same(tiny_model, tmp_path):
    whole, resumed = tiny_model(), tiny_model()
    trainer = trainer_of(whole, tmp_path / "whole")
    trainer.train()
    found = [not gate.is_neutral for gate in whole.exit_gates]
    assert found == [True, True, False, False], "of 1x8 and 2x16, not of 4x32"
    assert trainer.describe()["exit gates"]
    trainer_of(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in zip(whole.exit_gates, resumed.exit_gates, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_gates_without_projections_or_for_the_full_size_alone_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="exit_gates: the model has no exit projections; add --exit_projections true"):
        trainer_of(tiny_model(), tmp_path, exit_projections=False)
    with pytest.raises(ValueError, match="exit_gates: 4x32 alone is learned from and has nothing to learn"):
        trainer_of(tiny_model(), tmp_path, sizes=["4x32"])


@pytest.mark.parametrize("refined", [False, True])
def test_gates_come_after_training_and_change_no_layer_and_no_similarity_of_the_full_size(
    refined, tiny_model, tmp_path
):
    gated, plain = tiny_model(), tiny_model()
    trainer_of(gated, tmp_path / "gated", refine_projections=refined).train()
    trainer_of(plain, tmp_path / "plain", exit_gates=False).train()
    layers = dict(plain.backbone.named_parameters())
    assert all(torch.equal(layers[name], parameter) for name, parameter in gated.backbone.named_parameters())
    found, wanted = torch.from_numpy(gated.encode(TEXTS)), torch.from_numpy(plain.encode(TEXTS))
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T)
    for size in parse_ladder(LADDER)[:2]:
        assert distance(gated, wanted, size) < distance(plain, wanted, size)


@pytest.mark.parametrize("most", [60, 250_000])
def test_projections_are_refined_on_the_texts_that_gates_were_not_trained_on(most, tiny_model, monkeypatch):
    model, refined = tiny_model(), []
    fit_exit_projections(model, TEXTS)
    targets = torch.from_numpy(model.encode(TEXTS))
    monkeypatch.setattr(gates, "_TOKENS", most)
    monkeypatch.setattr(exits, "fit_exit_gates", partial(fit_exit_gates, steps=2))
    monkeypatch.setattr(exits, "refine_exit_projections", lambda *a, **b: refined.append((a[1], b["states"])))
    exits.refine_exits(model, TEXTS, targets, SIZES, gates=True, states=torch.zeros(3, len(TEXTS), 32))
    assert not model.exit_gates[0].is_neutral
    assert refined == ([(TEXTS, None)] if most == 60 else []), "on all texts, whose states the gates have changed"
    exits.refine_exits(model, TEXTS, targets, SIZES, states=torch.zeros(3, len(TEXTS), 32), pairs=[(0, 1)])
    assert refined[-1] == (TEXTS, None), "gates are not trained on pairs"


def test_gates_that_layers_were_trained_with_stay_as_they_are_when_exits_are_refined(tiny_model):
    model, _ = fitted(tiny_model, steps=2)
    full = torch.from_numpy(model.encode(TEXTS))
    before = [gate.weight.detach().clone() for gate in model.exit_gates]
    far = [distance(model, full, size) for size in SIZES[:3]]
    exits.refine_trained(model, TEXTS, SIZES, gates=True)
    assert all(torch.equal(gate.weight, old) for gate, old in zip(model.exit_gates, before, strict=True))
    assert all(distance(model, full, size) < old for size, old in zip(SIZES, far, strict=False))


def test_gates_that_a_model_has_are_trained_with_the_rest(tiny_model, tmp_path):
    model, _ = fitted(tiny_model, steps=2)
    before = [gate.weight.detach().clone() for gate in model.exit_gates]
    trainer_of(model, tmp_path, exit_gates=False).train()
    assert [torch.equal(gate.weight, old) for gate, old in zip(model.exit_gates, before, strict=True)] == [
        False, False, True, True]  # fmt: skip


def test_gates_in_chunks_are_trained_as_in_one_batch(tiny_model, tmp_path):
    models = [fitted(tiny_model, steps=2)[0] for _ in range(2)]
    for model, chunk in zip(models, (None, 3), strict=True):
        trainer_of(model, tmp_path, gradient_cache_chunk_size=chunk, dropout=False).train()
    for size in parse_ladder(LADDER):
        one, other = (torch.from_numpy(model.encode(TEXTS, *size)) for model in models)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_batches_of_long_texts_have_fewer_tokens(tiny_model, monkeypatch):
    monkeypatch.setattr(gates, "_BATCH_TOKENS", 60)
    model = tiny_model()
    targets = torch.eye(len(TEXTS))
    _, batches = gates._token_states(model, TEXTS, targets, [1], None)
    assert max(batch.mask.numel() for batch in batches) <= 60
    assert sorted(torch.cat([batch.targets.argmax(1) for batch in batches]).tolist()) == list(range(len(TEXTS)))
