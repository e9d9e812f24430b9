"""Hyper-parameter search with `TwoDMSETrainer`: each trial trains with its own arguments."""

from types import SimpleNamespace

import pytest
import transformers.integrations
from conftest import LADDER
from test_as_trainer import ROWS, SCORED, arguments
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, OptunaBackend
from transformers.trainer_utils import BestRun, HPSearchBackend

from trainer import TwoDMSETrainer

TRIALS = [
    {"objective": "matryoshka", "max_length": 8, "per_device_train_batch_size": 2},
    {"objective": "starbucks", "max_length": 12, "alignment_weight": 0.25, "batch_sampler": "no_duplicates"},
    {"exit_projections": True, "sizes": ["1x8", "4x32"], "loss_scale": 7.0},
    {"exit_projections": False, "sizes": LADDER},
]


class Backend(OptunaBackend):
    """Runs the trials above, one after the other."""

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, **kwargs):
        scores = []
        for number in range(n_trials):
            trainer.train(trial=SimpleNamespace(number=number, params=TRIALS[number]))
            scores.append(trainer.compute_objective(trainer.evaluate()))
        best = (max if direction == "maximize" else min)(range(n_trials), key=lambda number: scores[number])
        return BestRun(str(best), scores[best], TRIALS[best])


class Watch(TrainerCallback):
    """Keeps what each training has at its first step."""

    def __init__(self):
        self.trainer, self.seen = None, []

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if state.global_step == 0:
            self.seen.append(
                {
                    "objective": trainer.training_objective.name,
                    "weight": trainer.training_objective.alignment_weight,
                    "max_length": trainer.data_collator.max_length,
                    "sampler": trainer.block_sampler and trainer.block_sampler.kind,
                    "sizes": [str(size) for size in trainer.ladder],
                    "projections": trainer.encoder.exit_projections is not None,
                    "trained": len(trainer.optimizer.param_groups[0]["params"]),
                }
            )


@pytest.fixture
def search(tiny_model, tmp_path, monkeypatch):
    """A function that runs the first trials, and returns the best one and what was seen."""
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)

    def run(eval_dataset=SCORED, n_trials=4, hp_space=lambda trial: dict(trial.params), **kwargs):
        watch = Watch()
        args = arguments(tmp_path, max_steps=1, eval_strategy="no")
        trainer = TwoDMSETrainer(None, args, ROWS, eval_dataset, model_init=lambda: tiny_model(), callbacks=[watch])
        watch.trainer = trainer
        best = trainer.hyperparameter_search(hp_space, n_trials=n_trials, backend="optuna", **kwargs)
        return best, watch.seen

    return run


def test_each_trial_trains_with_its_own_arguments(search):
    best, seen = search()
    assert [trial["objective"] for trial in seen] == ["matryoshka", "starbucks", "starbucks", "starbucks"]
    assert [trial["max_length"] for trial in seen] == [8, 12, 12, 12]
    assert [trial["weight"] for trial in seen] == [None, 0.25, 0.25, 0.25]
    assert [trial["sampler"] for trial in seen] == [None, *["no_duplicates"] * 3]
    assert [trial["sizes"] for trial in seen] == [LADDER, LADDER, ["1x8", "4x32"], LADDER]
    assert [trial["projections"] for trial in seen] == [False, False, True, False]
    assert seen[2]["trained"] > seen[1]["trained"] == seen[3]["trained"]
    assert 0 < best.objective <= 1  # the mean of the ladder, not the sum of all metrics


def test_the_score_of_a_trial_is_higher_for_better_models(search):
    best, _ = search(n_trials=2, compute_objective=lambda metrics: metrics["eval_spearman_4x32"])
    worst, _ = search(n_trials=2, compute_objective=lambda metrics: metrics["eval_spearman_4x32"], direction="minimize")
    assert best.objective >= worst.objective


def test_values_of_a_trial_are_checked(search):
    with pytest.raises(ValueError, match=r"alignment_weight: -1.0 is not allowed; use a number of at least 0"):
        search(n_trials=1, hp_space=lambda trial: {"alignment_weight": -1.0})
    with pytest.raises(ValueError, match="loss: cosent does not fit the columns"):
        search(n_trials=1, hp_space=lambda trial: {"loss": "cosent"})
    with pytest.raises(ValueError, match="eval_dataset: there is none, and a search compares scores"):
        search(eval_dataset=None)
