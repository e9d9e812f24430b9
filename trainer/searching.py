"""The models that `model_init` makes, and the hyper-parameter search that needs them."""

from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import TwoDMSETrainingArguments
from .preparation import find_encoder, set_tokenizer
from .shared.mixin import TrainerMixin


class SearchMixin(TrainerMixin):
    """Goes before `Trainer`: each training starts from a new model, with the arguments of its trial."""

    args: TwoDMSETrainingArguments
    _first_model: Any = None
    _processing_class: PreTrainedTokenizerBase | None

    def hyperparameter_search(
        self,
        hp_space=None,
        compute_objective=None,
        n_trials=20,
        direction="maximize",
        backend=None,
        hp_name=None,
        **kwargs,
    ):
        """Search as `Trainer.hyperparameter_search` does, among all arguments of the training.

        Args:
            hp_space: makes the arguments of a trial.
            compute_objective: the score of a trial from the metrics of `evaluate`; by default `metric_for_best_model`,
                and not the sum of all metrics.
            n_trials: the number of trials.
            direction: `maximize`, because higher scores are better, or `minimize`.
            backend: `optuna`, `ray` or `wandb`; by default the one that is installed.
            hp_name: makes the name of the folder of a trial.
            **kwargs: passed to `Trainer.hyperparameter_search`.

        Raises:
            ValueError: there is no `eval_dataset`, or no metric of the given name.
        """
        if not self.eval_dataset:
            raise ValueError("eval_dataset: there is none, and a search compares scores; pass one to the trainer")
        score = compute_objective or self._score_of_trial
        return super().hyperparameter_search(hp_space, score, n_trials, direction, backend, hp_name, **kwargs)

    def call_model_init(self, trial=None):
        """The model that `model_init` makes; the first one, which the checks of the constructor use, is made once."""
        first, self._first_model = self._first_model, None
        model = super().call_model_init(trial) if first is None else first
        set_tokenizer(find_encoder(cast(PreTrainedModel, model)), self._processing_class)  # before Trainer, which warns
        return model

    def _score_of_trial(self, metrics: dict[str, float]) -> float:
        name = f"eval_{str(self.args.metric_for_best_model or 'ladder_mean').removeprefix('eval_')}"
        if name not in metrics:
            raise ValueError(f"metric_for_best_model: there is no {name}; use one of {', '.join(metrics)}")
        return metrics[name]

    def _hp_search_setup(self, trial):
        # The model exists when a trial sets its arguments, and everything else that they decide existed before.
        super()._hp_search_setup(trial)
        if trial is not None:
            self.args.check()
        if self.model_init is not None:
            self._take_model(cast(PreTrainedModel, self.model))
            self._take_data()
            cast(PreTrainedModel, self.model).to(self.args.device)  # type: ignore[arg-type]
            self._adapt_launch()
            self._before_training()

    # What a trainer defines.

    def _take_model(self, model: PreTrainedModel) -> None:
        """Set everything that belongs to a model."""
        raise NotImplementedError

    def _take_data(self) -> None:
        """Set everything that the arguments decide about the data."""
        raise NotImplementedError

    def _adapt_launch(self) -> None:
        """Set everything that the accelerator and the model decide together."""
        raise NotImplementedError

    def _before_training(self) -> None:
        """What comes between the model and the first step."""
        raise NotImplementedError
