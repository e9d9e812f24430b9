"""The ideas of the lab notes: each changes what it claims to change, and nothing else."""

import json

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset
from transformers import TrainerCallback

from modeling_2dmse import Size
from run_scripts import try_idea
from run_scripts.comparing.ideas import TRAINERS, idea_trainer
from run_scripts.try_idea import IDEAS
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.alignment import score_kl
from trainer.losses import SCORE_LOSSES

ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})
SCORED = Dataset.from_dict({"sentence1": SENTENCES[:8], "sentence2": SENTENCES[8:16], "score": [*map(float, range(8))]})
LARGEST = Size(4, 32)


@pytest.fixture
def make(tiny_model, tmp_path):
    """A function from the strengths of ideas to their trainer, with a model that has random projections."""

    def trainer(strengths: dict[str, float], rows: Dataset = ROWS, projected=True, **kwargs):
        settings = {
            "max_steps": 4, "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True, "bf16": False,
            "save_strategy": "no", "disable_tqdm": True, "sizes": LADDER, "learning_rate": 1e-2,
        }  # fmt: skip
        args = TwoDMSETrainingArguments(output_dir=str(tmp_path / "out"), **(settings | kwargs))
        kind = idea_trainer(strengths) if strengths else TwoDMSETrainer
        return kind(model=tiny_model(projected=projected).eval(), args=args, train_dataset=rows)

    return trainer


def loss_and_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the first rows and its gradients, without dropout."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.encoder.named_parameters() if p.grad is not None}


def plan(trainer):
    return trainer._step(trainer.data_collator([ROWS[0], ROWS[1]]))[-2]


def test_weights_of_the_largest_size(make):
    strengths = {"own_alignment": 0.25, "largest_loss": 3.0}
    usual, changed = (plan(make(s, teacher="start", alignment_weight=2.0)) for s in ({}, strengths))
    assert {t.size: t.weight for t in changed.terms} == {Size(1, 8): 1, Size(2, 16): 1, LARGEST: 3}
    assert {a.student: a.weight for a in changed.alignments} == {Size(1, 8): 2, Size(2, 16): 2, LARGEST: 0.25}
    assert [a[:3] for a in changed.alignments] == [a[:3] for a in usual.alignments]


def test_drawn_sizes_are_added_and_change_from_step_to_step(make):
    trainer, usual = make({"drawn_sizes": 2}, sizes=["1x8", "3x16", "4x32"]), plan(make({}, sizes=["1x8", "4x32"]))
    seen = set()
    for trainer.state.global_step in range(20):
        changed = plan(trainer)
        assert [t.size for t in changed.terms][:3] == [Size(1, 8), Size(3, 16), LARGEST]
        drawn = {t.size for t in changed.terms[3:]}
        assert len(drawn) == 2
        assert {a.student for a in changed.alignments} == {Size(1, 8), Size(3, 16), *drawn}
        assert {a._replace(student=None) for a in changed.alignments} == {usual.alignments[0]._replace(student=None)}
        seen |= drawn
    assert seen == {Size(1, 32), Size(2, 32), Size(3, 32)}


def test_shallow_gradients_are_scaled_only_in_the_layers(make):
    (loss, none), (_, half), (_, whole) = (loss_and_gradients(make({"shallow_gradient": f})) for f in (0.0, 0.5, 1.0))
    assert loss == pytest.approx(loss_and_gradients(make({}))[0], rel=1e-6)
    alone = loss_and_gradients(make({}, sizes=[str(LARGEST)], alignment="none"))[1]
    moved = 0
    for name, gradient in loss_and_gradients(make({}))[1].items():
        assert torch.allclose(whole[name], gradient, atol=1e-6), name
        if name.startswith("exit_projections."):
            assert torch.allclose(none[name], gradient, atol=1e-6), name
        else:
            assert torch.allclose(none[name], alone[name], atol=1e-6), name
            assert torch.allclose(half[name], (none[name] + gradient) / 2, atol=1e-6), name
            moved += not torch.allclose(none[name], gradient, atol=1e-3)
    assert moved > 10


def test_rates_fall_from_layer_to_layer(make):
    trainer = make({"layerwise_rates": 0.5})
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len([*trainer.encoder.parameters()])
    for name, parameter in trainer.encoder.named_parameters():
        below = next((int(word) for word in name.split(".") if word.isdigit()), 0)
        assert rates[id(parameter)] == pytest.approx(1e-2 * 0.5**below), name
    decays = {
        id(p): g["weight_decay"]
        for g in make({}, weight_decay=0.1).create_optimizer().param_groups
        for p in g["params"]
    }
    assert set(decays.values()) == {0.0, 0.1}
    trainer.train()


def test_angle_is_added_to_cosent(make, monkeypatch):
    monkeypatch.setitem(SCORE_LOSSES, "cosent+angle", None)  # removed again after the test
    losses = {
        loss: loss_and_gradients(make({}, SCORED, loss=loss, alignment="none"))[0] for loss in ("cosent", "angle")
    }
    both = loss_and_gradients(make({"angle_beside": 0.5}, SCORED, alignment="none"))[0]
    assert both == pytest.approx(losses["cosent"] + 0.5 * losses["angle"], rel=1e-5)
    assert losses["angle"] > 0.1


def test_weakened_directions(make):
    settings = {"projected": False, "exit_projections": True}
    usual, weakened = make({}, **settings), make({"weakened_directions": 0.5}, **settings)
    for trainer in (usual, weakened):
        trainer._fit_on_training_texts()
    factors = [
        b.weight / a.weight
        for a, b in zip(usual.encoder.exit_projections, weakened.encoder.exit_projections, strict=True)
    ]
    assert torch.allclose(factors[-1], torch.ones(()))
    full = torch.from_numpy(usual.encoder.encode(SENTENCES[:16]))
    variance = full.square().mean(dim=0)
    expected = (variance / variance.mean()).clamp(min=0.01) ** -0.5
    for factor in factors[:-1]:
        strong = factor[:8]  # the weights of weak directions are only rounding
        assert torch.allclose(strong, expected[:8, None].expand_as(strong), rtol=1e-3)
    assert expected[0] < 0.9 < 1.1 < expected[7]


def moved(trainer, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, p in trainer.encoder.named_parameters() if not torch.equal(before[n], p.detach())}


@pytest.mark.parametrize(("share", "frozen_from"), [(1.0, 0), (0.5, 2)])
def test_in_the_final_phase_only_projections_are_trained(make, share, frozen_from):
    trainer, kept = make({"final_phase": share}), []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kept.append({n: p.detach().clone() for n, p in trainer.encoder.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    late = moved(trainer, kept[frozen_from])
    assert late == {n for n in kept[0] if n.startswith("exit_projections.") and n[len("exit_projections.")] in "013"}
    assert (len(moved(trainer, kept[0])) > 20) == (share < 1)
    assert all(p.requires_grad for p in trainer.encoder.parameters())


@pytest.mark.parametrize("teacher", ["largest", "start"])
def test_a_chain_moves_weight_to_the_next_larger_size(make, teacher):
    settings = {"teacher": teacher, "alignment_weight": 2.0}
    usual, chained = make({}, **settings), make({"chain": 0.75}, **settings)
    for trainer in (usual, chained):
        trainer._before_training()
    (loss, _), (found, gradients) = loss_and_gradients(usual), loss_and_gradients(chained)
    vectors = embeddings(usual)
    target = embeddings(usual)[LARGEST]  # the start is the present model
    expected = loss
    for size, larger in ((Size(1, 8), Size(2, 16)), (Size(2, 16), LARGEST)):
        own, other = (score_kl(vectors[size], vectors_of) for vectors_of in (target, vectors[larger]))
        expected += 2.0 * 0.75 * (other - own).item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(loss, rel=1e-3)
    assert gradients


def embeddings(trainer) -> dict[Size, torch.Tensor]:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = trainer.encoder(**inputs, layers=(1, 2, 4)).layer_embeddings
    sizes = zip((Size(1, 8), Size(2, 16), LARGEST), states, strict=True)
    return {size: torch.nn.functional.normalize(state[:, : size.dim].double(), dim=-1) for size, state in sizes}


def test_a_bank_adds_the_vectors_of_earlier_steps(make):
    settings = {"teacher": "start", "alignment_weight": 2.0}
    usual, trainer = make({}, **settings), make({"bank": 10}, **settings)
    for each in (usual, trainer):
        each._before_training()
    loss = loss_and_gradients(usual)[0]
    assert loss_and_gradients(trainer)[0] == pytest.approx(loss, rel=1e-6), "nothing is kept before the first step"
    vectors, expected = embeddings(usual), loss
    for own in vectors.values():
        shares = [
            torch.log_softmax(20 * side @ side[-10:].T, dim=1) for side in (vectors[LARGEST], own)
        ]  # the last ten of 16 rows are kept
        expected += 2.0 * (shares[0].exp() * (shares[0] - shares[1])).sum().item() / 16
    assert loss_and_gradients(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert {len(side) for pair in trainer.banks.values() for side in pair} == {10}
    trainer.train()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_gradients_of_exits_are_balanced(make, power):
    found = {}
    for strength in ({}, {"balanced_gradients": power}):
        gradients = loss_and_gradients(make(strength))[1]
        found[bool(strength)] = [gradients[f"exit_projections.{index}.weight"] for index in (0, 1, 3)]
    ratios = [(new / old).flatten() for old, new in zip(found[False], found[True], strict=True)]
    for ratio in ratios:  # one factor for each exit
        assert torch.allclose(ratio.nanmedian(), ratio[ratio.isfinite()], rtol=0.05)
    assert ratios[0].nanmedian() != pytest.approx(ratios[2].nanmedian().item(), rel=0.05)


def test_balanced_gradients_have_the_mean_norm(make):
    trainer = make({"balanced_gradients": 1.0})
    gradient = torch.randn(3, 16, 32) * torch.tensor([1.0, 5.0, 20.0])[:, None, None]
    norms = gradient.flatten(1).norm(dim=1)
    assert torch.allclose(trainer._balance(gradient).flatten(1).norm(dim=1), norms.mean().expand(3))


def test_a_run_writes_what_finetune_writes(backbone_path, tmp_path):
    (tmp_path / "t.csv").write_text(
        "\n".join(["anchor,positive", *(f"{a},{b}" for a, b in zip(ROWS["anchor"], ROWS["positive"], strict=True))])
    )
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: {backbone_path('bert')}\nsizes: [1x8, 4x32]\n")
    shared = ["--train_file", str(tmp_path / "t.csv"), "--per_device_train_batch_size", "4", "--max_steps", "2"]
    shared += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_eval_samples", "0"]
    try_idea.main(
        [str(tmp_path / "r.yaml"), "--idea", "largest_loss=2", *shared, "--output_dir", str(tmp_path / "out")]
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "2dmse"
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--idea", "magic=1"], f"idea: 'magic' is unknown; choose one of {', '.join(IDEAS)}"),
        (["--idea", "largest_loss"], "idea: 'largest_loss' is not NAME=NUMBER, for example shallow_gradient=0.3"),
    ],
)
def test_wrong_input_ends_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        try_idea.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_every_idea_is_described_and_has_a_trainer():
    assert list(IDEAS) == list(TRAINERS)


def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match="shallow_gradient needs exits with projections"):
        make({"shallow_gradient": 0.5}, projected=False)
    with pytest.raises(ValueError, match="final_phase needs exits with projections"):
        make({"final_phase": 0.5}, projected=False)
    with pytest.raises(ValueError, match="needs one process and no gradient_cache_chunk_size"):
        make({"chain": 0.5}, gradient_cache_chunk_size=4)
    with pytest.raises(ValueError, match="angle_beside needs the loss cosent, not infonce"):
        make({"angle_beside": 1.0})
