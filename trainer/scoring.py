"""Evaluating and predicting with a `TwoDMSETrainer`."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from modeling_2dmse import Size, TwoDMSEModel

from .arguments import TwoDMSETrainingArguments
from .data import check_table, text_columns
from .evaluation import RetrievalData, StsData, evaluate_tasks, main_scores, mean_scores, task_from_table
from .shared.inference import evaluation_mode
from .shared.mixin import TrainerMixin
from .shared.tables import as_strings, check_texts, require_table

Task = StsData | RetrievalData


class ScoringMixin(TrainerMixin):
    """Goes before `Trainer`: evaluates every size of the ladder, and embeds tables."""

    args: TwoDMSETrainingArguments
    encoder: TwoDMSEModel
    ladder: list[Size]
    eval_dataset: Any

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate every size of the ladder on the evaluation tasks.

        Args:
            eval_dataset: a table, a dict of tables, a list of tasks, or the name of one task of the trainer; by default
                all of the trainer.
            ignore_keys: not used.
            metric_key_prefix: the first part of each name.

        Returns:
            `eval_spearman_1x32` or `eval_ndcg@10_1x32` for each size (with several tasks `eval_TASK_spearman_1x32`),
            and their mean, `eval_ladder_mean`.
        """
        if isinstance(eval_dataset, str):
            tasks = self._named(eval_dataset)
        else:
            tasks = as_tasks(self.eval_dataset if eval_dataset is None else eval_dataset)
        if not tasks:
            raise ValueError("eval_dataset: there is none; pass one to the trainer or to evaluate")
        metrics = self.score(tasks, self.ladder, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _named(self, name: str) -> list[Task]:
        tasks = [task for task in self.eval_dataset if task.name == name]
        if not tasks:
            known = ", ".join(task.name for task in self.eval_dataset) or "none"
            raise ValueError(f"eval_dataset: the trainer has no {name!r}, only {known}")
        return tasks

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The embeddings of a table at the largest size of the ladder, and the scores of `evaluate`.

        Args:
            test_dataset: a table, or one column of texts, of any name, which has embeddings and no scores.
            ignore_keys: not used.
            metric_key_prefix: the first part of each metric's name.

        Returns:
            `predictions`: a (rows, dim) array for each column of texts; `label_ids`: the scores of the rows, or None.
        """
        table = as_strings(require_table(test_dataset, "test_dataset"))
        metrics: dict[str, float] = {}
        if len(table.column_names) == 1:
            (name,) = table.column_names
            check_texts(table, name, "test_dataset", optional=False)
            table = table.rename_columns({name: "text"})
        else:
            table = check_table(table, "test_dataset")
            metrics = self.score([task_from_table(metric_key_prefix, table)], self.ladder, metric_key_prefix)
        with evaluation_mode(self.encoder):
            vectors, scores = embed_table(self.encoder, table, self.ladder[-1], self.args)
        return PredictionOutput(vectors, scores, metrics)  # type: ignore[arg-type]  # one array per column, not just one

    def score(self, tasks: Sequence[Task], sizes: Sequence[Size], prefix: str = "eval") -> dict[str, float]:
        """The metrics of `evaluate`, without logging them."""
        results = self.results(tasks, sizes)
        metrics = {}
        for task in tasks:
            name = _metric(task) if len(tasks) == 1 else f"{task.name}_{_metric(task)}"
            for size, value in main_scores(results)[task.name].items():
                metrics[f"{prefix}_{name}_{size}"] = value
        means = mean_scores(results)
        metrics[f"{prefix}_ladder_mean"] = sum(means.values()) / len(means)
        return metrics

    def results(self, tasks: Sequence[Task], sizes: Sequence[Size], **encode: Any) -> dict[str, Any]:
        """All metrics of all tasks at the given sizes, in the form of `results.json`."""
        encode.setdefault("batch_size", self.args.per_device_eval_batch_size)
        encode.setdefault("max_length", self.args.max_length)
        encode.setdefault("max_query_length", self.args.max_query_length)
        if self.args.disable_tqdm:
            encode.setdefault("show_progress_bar", False)
        with evaluation_mode(self.encoder):
            return evaluate_tasks(self.encoder, tasks, sizes, **encode)


def check_metric(args: TwoDMSETrainingArguments, tasks: Sequence[Task]) -> None:
    """ValueError if `metric_for_best_model`, which chooses a checkpoint, is no metric of `evaluate`."""
    chooses = args.load_best_model_at_end or args.save_strategy == "best"
    name = str(args.metric_for_best_model or "ladder_mean").removeprefix("eval_")
    parts = [f"{task.name}_{_metric(task)}" if len(tasks) > 1 else _metric(task) for task in tasks]
    known = ["ladder_mean", *(f"{part}_{size}" for part in parts for size in args.sizes or ())]
    if tasks and chooses and name not in known:
        raise ValueError(f"metric_for_best_model: there is no {name}; use one of {', '.join(known)}")


def _metric(task: Task) -> str:
    return "spearman" if isinstance(task, StsData) else "ndcg@10"


def embed_table(
    encoder: TwoDMSEModel, table: Dataset, size: Size, args: TwoDMSETrainingArguments
) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """A (rows, dim) array for each column of texts of a checked table, and the scores of the rows or None."""
    options: dict = {"batch_size": args.per_device_eval_batch_size, "max_length": args.max_length, "prompt": ""}
    vectors = [encoder.encode([text or "" for text in table[name]], *size, **options) for name in text_columns(table)]
    scores = np.asarray(table["score"]) if "score" in table.column_names else None
    return tuple(cast(list[np.ndarray], vectors)), scores


def as_tasks(eval_dataset: Dataset | Mapping[str, Dataset] | Sequence[Task] | None) -> list[Task]:
    """The evaluation tasks of a table, of a dict of tables by name, or of a list of tasks; none for None.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(eval_dataset, Mapping):
        return [_as_task(table, f"eval_dataset {name}", str(name)) for name, table in eval_dataset.items()]
    if isinstance(eval_dataset, (list, tuple)):
        if any(isinstance(item, Dataset) for item in eval_dataset):
            raise ValueError("eval_dataset: a list of tables has no names; pass a dict {NAME: TABLE}")
        return [item if isinstance(item, Task) else _as_task(item, "eval_dataset", "eval") for item in eval_dataset]
    return [] if eval_dataset is None else [_as_task(eval_dataset, "eval_dataset", "eval")]


def _as_task(table: object, argument: str, name: str) -> Task:
    return task_from_table(name, check_table(require_table(table, argument), argument))
