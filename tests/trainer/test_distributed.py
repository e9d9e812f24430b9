"""Several processes equal one process on the joined batch; cached gradients equal gradients without a cache."""

import functools
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LADDER, LEAVE, SENTENCES, TAUGHT, TRIPLETS, run_processes
from datasets import Dataset
from transformers import TrainerCallback

from modeling_2dmse import modeling_2dmse
from modeling_2dmse.batching import even_groups
from run_scripts.shared import runs
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.distributed import shard_by_layers
from trainer.losses import Rows
from trainer.objectives import OBJECTIVES
from trainer.shared import checkpoints
from trainer.shared.checkpoints import as_defined
from trainer.step_loss import plan_loss

ROOT = Path(__file__).resolve().parents[2]
SCORED = {"sentence1": SENTENCES[:12], "sentence2": SENTENCES[4:16], "score": [0.3, 0.1, 0.9, 0.4, 0.8, 0.5] * 2}
TABLES = {"infonce": TRIPLETS, "margin_mse": TAUGHT, "distill_kl": TAUGHT}
# Every objective with every alignment, and every loss.
CASES = [
    (objective, alignment, "infonce") for objective in OBJECTIVES for alignment in ("none", "feature_kl", "score_kl")
]
CASES += [(objective, None, loss) for objective in OBJECTIVES for loss in ("cosent", "angle", "cosine_mse")]
CASES += [("starbucks", "query_kl", loss) for loss in TABLES]


def make_trainer(model, folder, objective, alignment, loss, texts=None, guide=None, **kwargs) -> TwoDMSETrainer:
    args = TwoDMSETrainingArguments(
        output_dir=str(folder),
        sizes=LADDER,
        objective=objective,
        alignment=alignment,
        loss=loss,
        compression_dim=16,
        bf16=False,
        use_cpu=True,
        report_to="none",
        eval_strategy="no",
        load_best_model_at_end=False,
        seed=3,
        **kwargs,
    )
    rows = Dataset.from_dict(TABLES.get(loss, SCORED))
    trainer = TwoDMSETrainer(model, args, rows, unlabeled_texts=texts, guide=guide)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batch_of(trainer: TwoDMSETrainer, indices) -> dict:
    return trainer.data_collator([trainer.train_dataset[index] for index in indices])


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain_step(trainer: TwoDMSETrainer, micro_batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in one process, without the trainer's step: the mean over the micro-batches."""
    model, total = trainer.encoder, 0.0
    for index, indices in enumerate(micro_batches):
        inputs = batch_of(trainer, indices)
        rows = Rows.of_batch(inputs)
        plan = trainer.training_objective.plan(random.Random(f"{trainer.args.seed}-0-{index}"))
        states = model(**inputs, layers=plan.layers).layer_embeddings
        loss = plan_loss(plan, states, rows, trainer.args.loss, trainer.args.loss_scale)[0]
        (loss / len(micro_batches)).backward()
        total += loss.item() / len(micro_batches)
    return total, gradients(model)


def assert_same(ours: dict, expected: dict) -> None:
    assert set(ours) == set(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        # float32: the error of a sum over all tokens is proportional to its largest entries.
        close = {"atol": 1e-5 * max(1.0, gradient.abs().max().item()), "rtol": 1e-4}
        torch.testing.assert_close(ours[name], gradient, **close, msg=lambda text, n=name: f"{n}: {text}")


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def check_processes(start: str, folder: str) -> None:
    """Runs in each of several processes: 1 and 2 batches of some cases; all processes together run every case once."""
    from modeling_2dmse import TwoDMSEModel

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    counts = [4, 3, 2][:world]  # uneven, as at the end of an epoch
    for chunk, cases in ((None, CASES[::2]), (2, CASES[1::4])) if world == 2 else ((None, CASES[3::4]),):
        for case in cases:
            model = without_dropout(TwoDMSEModel.from_pretrained(start, attn_implementation="eager"))
            trainer = make_trainer(model, folder, *case, gradient_cache_chunk_size=chunk)
            wrapped = trainer.accelerator.prepare(model)
            assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
            own = range(sum(counts[:rank]), sum(counts[: rank + 1]))
            joined = range(sum(counts))
            for micro in (1, 2):
                trainer._micro_step = (-1, 0)
                trainer.current_gradient_accumulation_steps = micro
                batches = [[(i + 5 * m) % 12 for i in own] for m in range(micro)]
                loss = 0.0
                for index, indices in enumerate(batches):
                    trainer.accelerator.gradient_state._set_sync_gradients(index == micro - 1)
                    with trainer.accelerator.no_sync(wrapped) if index < micro - 1 else torch.enable_grad():
                        loss += trainer.training_step(wrapped, batch_of(trainer, indices)).item()
                ours = gradients(wrapped)
                expected = plain_step(trainer, [[(i + 5 * m) % 12 for i in joined] for m in range(micro)])
                assert abs(loss - expected[0]) < 1e-5 * max(1, abs(expected[0])), (case, chunk, loss, expected[0])
                assert_same(ours, expected[1])
    check_without_gathering(start, folder, rank, counts)
    check_start(start, folder, rank, counts)
    check_skipped_projections(start, folder)
    check_resume(folder)
    (Path(folder) / f"equal-{rank}").touch()


def check_without_gathering(start: str, folder: str, rank: int, counts: list[int]) -> None:
    """Without gathering: the mean of the gradients that each process computes from its own rows."""
    from modeling_2dmse import TwoDMSEModel

    model = without_dropout(TwoDMSEModel.from_pretrained(start, attn_implementation="eager"))
    trainer = make_trainer(model, folder, "starbucks", None, "infonce", gather_negatives=False)
    wrapped = trainer.accelerator.prepare(model)
    parts = [list(range(sum(counts[:r]), sum(counts[: r + 1]))) for r in range(len(counts))]
    trainer.training_step(wrapped, batch_of(trainer, parts[rank]))
    assert_same(gradients(wrapped), plain_step_mean(trainer, parts))


def check_start(start: str, folder: str, rank: int, counts: list[int]) -> None:
    """The states of the model before training are gathered like the others, and so are the rows without labels."""
    from modeling_2dmse import TwoDMSEModel

    for chunk in (None, 2):
        model = without_dropout(TwoDMSEModel.from_pretrained(start, attn_implementation="eager"))
        settings = {"teacher": "start", "gradient_cache_chunk_size": chunk, "per_device_train_batch_size": 3}
        trainer = make_trainer(model, folder, "starbucks", None, "infonce", SENTENCES, **settings)
        trainer._start = TwoDMSEModel.from_pretrained(start, attn_implementation="eager")
        with torch.no_grad():
            for parameter in trainer._start.parameters():
                parameter.mul_(1.1)
        wrapped = trainer.accelerator.prepare(model)
        own = range(sum(counts[:rank]), sum(counts[: rank + 1]))
        loss = trainer.training_step(wrapped, batch_of(trainer, own)).item()
        ours = gradients(wrapped)
        inputs = batch_of(trainer, range(sum(counts)))
        rows = Rows(inputs.pop("counts"), unlabeled=inputs.pop("unlabeled"))
        plan = trainer.training_objective.plan(random.Random(0))
        with torch.no_grad():
            taught = trainer._start(**inputs, layers=(4,)).layer_embeddings[0]
        states = model(**inputs, layers=plan.layers).layer_embeddings
        expected, parts = plan_loss(plan, states, rows, "infonce", start=taught)
        assert parts["alignment/4x32"] > 1e-3
        assert parts["unlabeled/4x32"] > 1e-3
        assert rows.unlabeled == sum(counts)
        expected.backward()
        assert abs(loss - expected.item()) < 1e-5 * expected.item()
        assert_same(ours, gradients(model))


def check_skipped_projections(start: str, folder: str) -> None:
    """Steps with gradient checkpointing that use only some of the projections."""
    from modeling_2dmse import TwoDMSEModel

    model = TwoDMSEModel.from_pretrained(start)
    model.add_exit_projections()
    before = [projection.weight.clone() for projection in model.exit_projections]
    settings = {"gradient_checkpointing": True, "max_steps": 3, "per_device_train_batch_size": 3}
    make_trainer(model, folder, "starbucks", None, "infonce", save_strategy="no", **settings).train()
    moved = [not torch.equal(p.weight, old) for p, old in zip(model.exit_projections, before, strict=True)]
    assert moved == [True, True, False, True]


def plain_step_mean(trainer: TwoDMSETrainer, parts: list[list[int]]) -> dict[str, torch.Tensor]:
    every = [plain_step(trainer, [part])[1] for part in parts]
    return {name: sum(gradient[name] for gradient in every) / len(every) for name in every[0]}


def check_fsdp2(start: str, folder: str) -> None:
    """With the units that accelerate makes under FSDP2, exits and gradients equal those of the whole model."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    from modeling_2dmse import TwoDMSEModel

    policy = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
    accelerator = SimpleNamespace(  # accelerate itself runs FSDP only on GPUs
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **policy)),
        torch_device_mesh=init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["shard"]),
        mixed_precision="no",
        is_main_process=False,
    )
    whole, spread = (TwoDMSEModel.from_pretrained(start).eval() for _ in range(2))
    shard_by_layers(accelerator, spread)
    spread = fsdp2_prepare_model(accelerator, spread)
    units = [type(module).__name__ for module in spread.modules() if isinstance(module, FSDPModule)]
    assert units.count("FSDPBertLayer") == 4
    assert len(units) == 6, "the layers, the word embeddings and the rest"
    ids = torch.arange(20).reshape(4, 5) + 5
    states = [model(ids, layers=(1, 2, 4), num_buckets=2).layer_embeddings for model in (whole, spread)]
    torch.testing.assert_close(states[1], states[0])
    for state in states:
        (state[..., :8] ** 2).sum().backward()
    read = {name: p.grad for name, p in spread.named_parameters() if p.grad is not None}
    found = {name: gradient.full_tensor() for name, gradient in read.items()}
    expected = gradients(whole)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    weights = get_model_state_dict(spread, options=StateDictOptions(full_state_dict=True))
    if os.environ["RANK"] == "0":
        saved = Path(folder) / "saved"
        with as_defined(spread):
            spread.save_pretrained(saved, state_dict=weights)
        auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModel"] == "modeling_2dmse.TwoDMSEModel"
        assert (saved / "modeling_2dmse.py").exists()
        again = TwoDMSEModel.from_pretrained(saved).state_dict()
        assert all(torch.equal(again[name], value) for name, value in whole.state_dict().items())
    assert type(spread).__name__ == "FSDPTwoDMSEModel"
    (Path(folder) / f"equal-{os.environ['RANK']}").touch()


def check_resume(folder: str) -> None:
    """Each process finds another newest checkpoint, as while another run still writes: all resume the first's."""
    args = TwoDMSETrainingArguments(output_dir=folder, resume_from_checkpoint="true", use_cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "check_not_beyond", lambda *_: None)
        patch.setattr(checkpoints, "find_checkpoint", lambda folder, world_size: f"checkpoint-{os.environ['RANK']}")
        assert runs.find_checkpoint(args) == "checkpoint-0"


def run_check(function: str, world: int, tmp_path: Path, module: str = "test_distributed") -> None:
    """Run one of the checks above in several gloo processes."""
    call = f"t.{function}({str(tmp_path / 'start')!r}, {str(tmp_path)!r})"
    (tmp_path / "run.py").write_text(f"import {module} as t; {call}{LEAVE}")
    run_processes(world, tmp_path / "run.py", folders=(ROOT, ROOT / "tests", ROOT / "tests" / "trainer"))
    assert len(list(tmp_path.glob("equal-*"))) == world


@pytest.mark.parametrize(("world", "projected"), [(2, True), (3, False)])
def test_several_processes_equal_one_on_the_joined_batch(world, projected, tiny_model, tmp_path):
    tiny_model(projected=projected).save_pretrained(tmp_path / "start")
    run_check("check_processes", world, tmp_path)


def test_fsdp2_runs_the_exits(tiny_model, tmp_path):
    tiny_model(projected=True).save_pretrained(tmp_path / "start")
    run_check("check_fsdp2", 2, tmp_path)


def test_fsdp_refuses_settings_that_need_all_weights(under_fsdp, tiny_model, tmp_path, caplog):
    from peft import LoraConfig, get_peft_model

    case = ("starbucks", "score_kl", "infonce")
    for settings, message in (
        ({"teacher": "start"}, "teacher: start needs all weights in one process, without adapters, FSDP"),
        ({"initial_share": 0.5}, "initial_share: the average needs all weights in one process, without adapters, FSDP"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tiny_model(), tmp_path, *case, **settings)
    with pytest.raises(ValueError, match="model: adapters cannot be trained under FSDP; use DDP"):
        make_trainer(get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear")), tmp_path, *case)
    trainer = make_trainer(tiny_model(), tmp_path, *case, exit_projections=True)
    trainer.is_fsdp_enabled = False  # this process trains with all weights, and ends as under FSDP
    trainer.add_callback(EndUnderFsdp(trainer))
    fitted = []
    trainer._fit_on_training_texts = lambda layers=None: fitted.append(layers)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert fitted == [None], "exits that are not on the ladder are not fitted again"
    assert "the exits [3], which are not on the ladder, keep their initial fit" in caplog.text


class EndUnderFsdp(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, *args, **kwargs):
        self.trainer.is_fsdp_enabled = True


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_cached_gradients_equal_plain_ones_with_dropout(case, tiny_model, tmp_path, monkeypatch):
    """The step without a cache runs in buckets that equal the chunks, so the same rows get the same random numbers."""
    model = tiny_model()
    columns, rows = (4, 30) if case[2] in TABLES else (2, 18)
    for chunk in (1, 3, 5, 7):
        results = []
        like_chunks = functools.partial(even_groups, rows=chunk * columns)
        monkeypatch.setattr(modeling_2dmse, "tight_groups", lambda lengths, count, cut=like_chunks: cut(lengths))
        for settings in ({"num_buckets": -(-rows // (chunk * columns))}, {"gradient_cache_chunk_size": chunk}):
            trainer = make_trainer(model, tmp_path, *case, **settings)
            torch.manual_seed(0)
            loss = trainer.training_step(model, batch_of(trainer, range(9))).item()
            results.append((loss, gradients(model), torch.rand(1).item()))
        plain, cached = results
        assert cached[0] == pytest.approx(plain[0], abs=1e-5)
        assert_same(cached[1], plain[1])
        assert cached[2] == plain[2], "the random state after the step is the same"
    trainer = make_trainer(model, tmp_path, *case)
    torch.manual_seed(1)
    trainer.training_step(model, batch_of(trainer, range(9)))
    other = gradients(model)
    assert any((other[name] - value).abs().max() > 1e-3 for name, value in plain[1].items()), "dropout has no effect"


@pytest.mark.parametrize(
    "extra", ["accumulation", "checkpointing", "lora", "bf16", "projections", "start", "unlabeled"]
)
def test_the_cache_works_with(extra, tiny_model, tmp_path):
    """Some steps with the cache give the same weights as without it."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "accumulation": {"gradient_accumulation_steps": 2},
        "checkpointing": {"gradient_checkpointing": True},
        "lora": {},
        "bf16": {"bf16": True},
        "projections": {},
        "start": {"teacher": "start", "alignment_weight": 3.0},
        "unlabeled": {"unlabeled_weight": 2.0},
    }[extra]
    unlabeled_texts = SENTENCES if extra == "unlabeled" else None
    results = []
    for chunk in (None, 2):
        model = without_dropout(tiny_model(projected=extra == "projections"))
        torch.manual_seed(0)  # after the folder of the backbone, whose first use makes it
        if extra == "lora":
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        args = TwoDMSETrainingArguments(
            output_dir=str(tmp_path / f"{extra}-{chunk}"),
            sizes=LADDER,
            per_device_train_batch_size=6,
            max_steps=3,
            learning_rate=1e-3,
            optim="sgd",
            gradient_cache_chunk_size=chunk,
            use_cpu=True,
            report_to="none",
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            disable_tqdm=True,
            logging_steps=1,
            **({"bf16": False} | settings),
        )
        trainer = TwoDMSETrainer(model, args, Dataset.from_dict(TRIPLETS), unlabeled_texts=unlabeled_texts)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        moved = [after.detach() - old for after, old in zip(model.parameters(), before, strict=True)]
        results.append((losses, moved))
    (plain_losses, plain), (cached_losses, cached), tolerance = *results, 0.05 if extra == "bf16" else 1e-4
    assert cached_losses == pytest.approx(plain_losses, rel=tolerance)
    assert max(change.abs().max() for change in plain) > 1e-4
    for ours, expected in zip(cached, plain, strict=True):
        scale = expected.abs().max()
        assert (ours - expected).abs().max() <= max(tolerance * scale, 1e-6) if extra != "bf16" else True


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_size(tiny_model, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.backbone.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    for chunk in (None, 2):
        trainer = make_trainer(model, tmp_path, "starbucks", None, "infonce", gradient_cache_chunk_size=chunk)
        with pytest.raises(FloatingPointError, match=r"the loss is nan in step 1, from loss/2x16, loss/4x32"):
            trainer.training_step(model, batch_of(trainer, range(4)))
