"""What else people do with transformers' Trainer: model_init, predict, a model that was loaded with its own code."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import LADDER, SENTENCES, run_elsewhere
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import TrainerCallback, TrainingArguments, trainer_utils

from modeling_2dmse import TwoDMSEModel
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.evaluation import RetrievalData, StsData
from trainer.franca.trainer import FrancaTrainer
from trainer.m3.trainer import M3Trainer
from trainer.preparation import check_checkpointing
from trainer.scoring import as_tasks, check_metric
from trainer.smae.trainer import SmaeTrainer

ROWS = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})
SCORED = Dataset.from_dict({"sentence1": SENTENCES[:6], "sentence2": SENTENCES[6:12], "score": [0, 1, 2, 3, 4, 5]})


def arguments(folder, **kwargs) -> TwoDMSETrainingArguments:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_tqdm": True, "sizes": LADDER, "seed": 3,
    }  # fmt: skip
    return TwoDMSETrainingArguments(output_dir=str(folder), **(settings | kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"exit_projections": True, "teacher": "start", "initial_share": 0.5}])
def test_model_init_trains_what_a_model_trains(kwargs, tiny_model, tmp_path):
    kwargs = kwargs | {"dropout": False}
    given = TwoDMSETrainer(tiny_model(), arguments(tmp_path, **kwargs), ROWS)
    given.train()
    made = []
    trainer = TwoDMSETrainer(
        None, arguments(tmp_path, **kwargs), ROWS, model_init=lambda: made.append(tiny_model()) or made[-1]
    )
    for _ in range(2):  # each training starts from a new model
        trainer.train()
        assert trainer.model is trainer.encoder is made[-1]
        assert trainer.encoder.config.sizes == LADDER
        for old, new in zip(given.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(old.cpu(), new.cpu(), atol=1e-5, rtol=1e-4)
    assert len(made) == 3
    assert not torch.equal(made[0].get_input_embeddings().weight, made[-1].get_input_embeddings().weight)


def test_model_init_may_take_the_trial_of_a_search(tiny_model, tmp_path):
    trials = []
    trainer = TwoDMSETrainer(
        None, arguments(tmp_path), ROWS, model_init=lambda trial: trials.append(trial) or tiny_model()
    )
    trainer.train()
    trainer.call_model_init({"learning_rate": 1e-3})
    assert trials == [None, None, {"learning_rate": 1e-3}]
    with pytest.raises(ValueError, match="model: give either model or model_init"):
        TwoDMSETrainer(tiny_model(), arguments(tmp_path), ROWS, model_init=tiny_model)
    with pytest.raises(ValueError, match="model: give either model or model_init"):
        TwoDMSETrainer(None, arguments(tmp_path), ROWS)


def test_without_model_and_arguments_as_in_trainer(tiny_model, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(trainer_utils.logger, "warning", lines.append)
    made = tiny_model("roberta")
    made.config.pad_token_id = made.config.bos_token_id = 9  # which the tokenizer has not
    trainer = TwoDMSETrainer(
        args=arguments(tmp_path, max_steps=1), train_dataset=ROWS, model_init=lambda: copy.deepcopy(made)
    )
    trainer.train()
    assert trainer.encoder.config.pad_token_id == trainer.processing_class.pad_token_id == 0
    assert not [line for line in lines if "new PAD/BOS/EOS tokens" in line]
    monkeypatch.chdir(tmp_path)
    for made in (
        TwoDMSETrainer(train_dataset=ROWS, model_init=lambda: tiny_model()),
        TwoDMSETrainer(tiny_model(), train_dataset=ROWS),
    ):
        assert type(made.args) is TwoDMSETrainingArguments
        assert made.args.output_dir == "tmp_trainer"
    with pytest.raises(ValueError, match="model: give either model or model_init"):
        TwoDMSETrainer()
    for kind in (SmaeTrainer, M3Trainer, FrancaTrainer):
        with pytest.raises(ValueError, match="model: None is not allowed; give a model"):
            kind(model_init=lambda: None)


def test_a_search_keeps_its_score_in_the_trainer(tiny_model, tmp_path):
    """As the backends of `hyperparameter_search` do after each evaluation of a trial."""

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.objective = 0.5

    trainer = TwoDMSETrainer(None, arguments(tmp_path), ROWS, model_init=lambda: tiny_model(), callbacks=[Report()])
    for _ in range(2):
        trainer.objective = None
        trainer.train()
        assert trainer.objective == 0.5


def test_several_tables_to_evaluate_on(tiny_model, tmp_path):
    trainer = TwoDMSETrainer(tiny_model(), arguments(tmp_path), {"a": ROWS, "b": ROWS}, {"sts": SCORED, "qa": ROWS})
    assert len(trainer.train_dataset) == 2 * len(ROWS)
    metrics = trainer.evaluate()
    assert {f"eval_sts_spearman_{size}" for size in LADDER} < set(metrics)
    assert {f"eval_qa_ndcg@10_{size}" for size in LADDER} < set(metrics)
    alone = trainer.evaluate("sts")
    assert alone["eval_spearman_1x8"] == metrics["eval_sts_spearman_1x8"]
    splits = DatasetDict({"sts": SCORED})
    assert trainer.evaluate(splits)["eval_ladder_mean"] == alone["eval_ladder_mean"]
    with pytest.raises(ValueError, match="eval_dataset: the trainer has no 'other', only sts, qa"):
        trainer.evaluate("other")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (DatasetDict({"train": ROWS, "test": ROWS}), "a DatasetDict is a dict of splits; pass one of train, test"),
        (ROWS.to_iterable_dataset(), "an IterableDataset has no number of rows"),
        (ROWS.to_pandas(), "a datasets.Dataset is needed, not DataFrame; make one with Dataset.from_list"),
        (ROWS.to_list(), "a datasets.Dataset is needed, not dict"),
        ("pairs.csv", "a datasets.Dataset is needed, not str"),
        ([], "it is empty"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(table, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=f"^train_dataset: {message}"):
        TwoDMSETrainer(tiny_model(), arguments(tmp_path), table)
    trainer = TwoDMSETrainer(tiny_model(), arguments(tmp_path), ROWS)
    with pytest.raises(ValueError, match=r"^test_dataset: "):
        trainer.predict(table)
    if not isinstance(table, (DatasetDict, str)):  # which evaluate takes
        with pytest.raises(ValueError, match=r"^eval_dataset: "):
            trainer.evaluate(table)


def test_what_would_have_no_effect_is_refused(tiny_model, tmp_path):
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"{name}: it would not be called"):
            TwoDMSETrainer(tiny_model(), arguments(tmp_path), ROWS, **{name: lambda *_: {}})
    with pytest.raises(ValueError, match="args: TwoDMSETrainingArguments are needed, not TrainingArguments"):
        TwoDMSETrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True), ROWS)
    with pytest.raises(ValueError, match=r"neftune_noise_alpha: leave it out.*label_smoothing_factor.*batch_sampler"):
        arguments(
            tmp_path, neftune_noise_alpha=5, label_smoothing_factor=0.1, train_sampling_strategy="group_by_length"
        )
    model = tiny_model()
    optimizers = torch.optim.SGD(model.parameters()), None
    TwoDMSETrainer(model, arguments(tmp_path), ROWS, optimizers=optimizers)
    with pytest.raises(ValueError, match="optimizers: the optimizer lacks the exit projections"):
        TwoDMSETrainer(model, arguments(tmp_path, exit_projections=True), ROWS, optimizers=optimizers)


def test_a_metric_that_does_not_exist_is_refused_before_the_training(tmp_path):
    tasks = as_tasks({"sts": SCORED})
    for name in ("ladder_mean", "eval_spearman_1x8", None):
        check_metric(arguments(tmp_path, metric_for_best_model=name, save_strategy="best"), tasks)
    with pytest.raises(ValueError, match="there is no loss; use one of ladder_mean, spearman_1x8"):
        check_metric(arguments(tmp_path, metric_for_best_model="loss", save_strategy="best"), tasks)
    check_metric(arguments(tmp_path, metric_for_best_model="loss"), tasks)  # nothing is chosen


def test_predict(tiny_model, tmp_path):
    model = tiny_model()
    trainer = TwoDMSETrainer(model, arguments(tmp_path), ROWS)
    output = trainer.predict(SCORED)
    for vectors, column in zip(output.predictions, ("sentence1", "sentence2"), strict=True):
        assert np.allclose(vectors, model.encode(SCORED[column][:], 4, 32), atol=1e-6)
    assert output.label_ids.tolist() == SCORED["score"][:]
    assert output.metrics == trainer.score(as_tasks(SCORED), trainer.ladder, "test")
    assert set(output.metrics) == {*(f"test_spearman_{size}" for size in LADDER), "test_ladder_mean"}
    pairs = trainer.predict(ROWS)
    assert pairs.label_ids is None
    assert [len(vectors) for vectors in pairs.predictions] == [8, 8]
    for name in ("text", "score"):  # any name
        one = trainer.predict(Dataset.from_dict({name: ROWS["anchor"][:]}))
        assert np.array_equal(one.predictions, pairs.predictions[:1])
        assert (one.label_ids, one.metrics) == (None, {})
    with pytest.raises(ValueError, match="test_dataset: column number holds int64, not texts"):
        trainer.predict(Dataset.from_dict({"number": [1, 2]}))


@pytest.mark.parametrize("rows", [ROWS.select([]), SCORED.select([]), Dataset.from_dict({"text": []})])
def test_an_empty_table_is_refused(rows, tiny_model, tmp_path):
    trainer = TwoDMSETrainer(tiny_model(), arguments(tmp_path), ROWS)
    for name, call in {
        "test_dataset": trainer.predict,
        "eval_dataset": trainer.evaluate,
        "eval_dataset b": lambda rows: trainer.evaluate({"a": ROWS, "b": rows}),
        "train_dataset": lambda rows: TwoDMSETrainer(tiny_model(), arguments(tmp_path), [ROWS, rows]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: the table has no rows$"):
            call(rows)
    for task in (StsData("a", [], [], []), RetrievalData("a", {}, {"d": "text"}, {}), RetrievalData("a", {}, {}, {})):
        with pytest.raises(ValueError, match=r"^tasks: a has nothing to score$"):
            trainer.evaluate([task])


FOREIGN = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
sys.path.insert(0, sys.argv[2])
from trainer.preparation import find_encoder
try:
    find_encoder(model)
except ValueError as error:
    assert "loaded with the code of its folder, before twodmse was imported" in str(error), error
else:
    raise AssertionError("accepted")
"""


def test_a_model_with_the_code_of_its_folder_is_refused_in_one_line(tiny_model, tmp_path):
    from pathlib import Path

    tiny_model().save_pretrained(tmp_path / "model")
    run_elsewhere(FOREIGN, tmp_path, str(tmp_path / "model"), str(Path(__file__).resolve().parents[2]))


def test_reentrant_checkpointing_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(TwoDMSETrainingArguments, "world_size", 2)
    on = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant does not go with several processes"):
        check_checkpointing(arguments(tmp_path, **on))
    check_checkpointing(arguments(tmp_path, **on, num_buckets=1))
    check_checkpointing(arguments(tmp_path, gradient_checkpointing=True))
    monkeypatch.setattr(TwoDMSETrainingArguments, "world_size", 1)
    check_checkpointing(arguments(tmp_path, **on))


def test_a_run_leaves_the_longest_input_of_the_tokenizer_and_saves_new_words(tiny_model, tmp_path, caplog):
    model = tiny_model()
    model.tokenizer.add_tokens(["zeppelin", *(f"word{number}" for number in range(200))])
    with pytest.raises(ValueError, match=r"call resize_token_embeddings\(len\(tokenizer\)\)"):
        TwoDMSETrainer(model, arguments(tmp_path), ROWS)
    model.resize_token_embeddings(len(model.tokenizer) + 100)
    trainer = TwoDMSETrainer(model, arguments(tmp_path, max_length=8, save_strategy="steps", save_steps=2), ROWS)
    trainer.train()
    assert "PAD/BOS/EOS" not in caplog.text
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" ".join(SENTENCES)).ids) == 48
        assert TwoDMSEModel.from_pretrained(folder).max_length == 48
        config = json.loads((folder / "config.json").read_text())
        assert config["backbone_config"]["vocab_size"] == len(model.tokenizer) + 100
    again = TwoDMSEModel.from_pretrained(tmp_path)
    assert np.allclose(again.encode(["a zeppelin"]), model.encode(["a zeppelin"]), atol=1e-6)


def test_adapters_are_saved_with_new_words_and_only_then_with_the_word_embeddings(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "elastic")
    settings = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    for words, model in ((0, tiny_model()), (7, TwoDMSEModel.from_pretrained(tmp_path / "elastic"))):
        model.resize_token_embeddings(160 + words)
        adapted = peft.get_peft_model(model, settings)
        trainer = TwoDMSETrainer(adapted, arguments(tmp_path / str(words), save_strategy="steps", save_steps=2), ROWS)
        trainer.train()
        saved = load_file(tmp_path / str(words) / "checkpoint-2" / "adapter_model.safetensors")
        assert any("word_embeddings" in name for name in saved) == bool(words)
        merged, expected = adapted.merge_and_unload(), adapted.encode(SENTENCES)
        merged.save_pretrained(tmp_path / f"merged{words}")
        again = TwoDMSEModel.from_pretrained(tmp_path / f"merged{words}")
        np.testing.assert_allclose(again.encode(SENTENCES), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [SmaeTrainer, M3Trainer, FrancaTrainer])
def test_other_trainers_refuse_model_init(kind, tmp_path):
    with pytest.raises(ValueError, match="model: None is not allowed; give a model, because this trainer"):
        kind(None, arguments(tmp_path), model_init=lambda: None)
