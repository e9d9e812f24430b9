"""Training nested classifiers, and evaluating every size, the cascade and the best choice of sizes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer

from modeling_mrl import Size
from modeling_mrl.classifier import MatryoshkaClassifier
from modeling_mrl.outputs import CascadeOutput
from modeling_mrl.running import execution_device

from ..shared.attention import AttentionMixin, UnreadMaskMixin
from ..shared.callbacks import EvaluateLastStep, StopSignals
from ..shared.checkpoints import CheckpointMixin
from ..shared.inference import evaluation_mode
from ..shared.mixin import check_at_hand, given_or_default
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin
from .arguments import ClassifierTrainingArguments


class ClassifierTrainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, AttentionMixin, UnreadMaskMixin, Trainer):
    """Trains a nested classifier: the loss of every size is logged, and every size is evaluated.

    Args:
        model: the classifier.
        args: the arguments; without any, the defaults, written to `tmp_trainer`.
        eval_dataset: rows to evaluate on.
        **kwargs: passed to `Trainer`; `data_collator` must make batches with `labels`.

    Raises:
        ValueError: weights of the model are offloaded.
    """

    args: ClassifierTrainingArguments

    # compute_loss returns the mean of one batch; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: MatryoshkaClassifier | None = None,
        args: ClassifierTrainingArguments | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        if model is not None:  # which Trainer then makes
            check_at_hand(model)
        args = given_or_default(args, ClassifierTrainingArguments)
        if eval_dataset is None:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        self.stop_signals = StopSignals()
        callbacks = [EvaluateLastStep(), self.stop_signals, *(kwargs.pop("callbacks", None) or [])]
        super().__init__(model=model, args=args, eval_dataset=eval_dataset, callbacks=callbacks, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model; the losses of its sizes are logged."""
        outputs = model(**inputs)
        sizes = self.accelerator.unwrap_model(model).config.sizes
        losses = outputs.losses.detach()
        self.record(outputs.loss.detach(), {f"loss/{size}": loss for size, loss in zip(sizes, losses, strict=True)})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The accuracy of every size, `eval_accuracy_2x64`, and so on, and their mean, `eval_accuracy_mean`."""
        model, dataset = self.accelerator.unwrap_model(self.model), eval_dataset or self.eval_dataset
        batch = self.args.per_device_eval_batch_size
        with evaluation_mode(model):
            logits, labels = model.collect_logits(dataset, self.data_collator, batch, self.args.disable_tqdm or None)
        accuracy = (logits.argmax(dim=-1) == labels).double().mean(dim=1).tolist()
        metrics = {
            f"{metric_key_prefix}_accuracy_{size}": value
            for size, value in zip(model.config.sizes, accuracy, strict=True)
        }
        metrics[f"{metric_key_prefix}_accuracy_mean"] = sum(accuracy) / len(accuracy)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def evaluate_classifier(
    model: MatryoshkaClassifier,
    dataset: Dataset,
    collator: Callable,
    batch_size: int = 32,
    disable_tqdm: bool | None = None,
) -> dict[str, Any]:
    """Evaluate every size, the oracle, and the cascade if the model has one.

    Args:
        model: the classifier.
        dataset: rows that neither the heads nor the cascade have seen.
        collator: makes batches with `labels` from the rows.
        batch_size: rows per batch.
        disable_tqdm: hide the progress bar; by default it is shown on a terminal.

    Returns:
        `{"n": rows, "accuracy": {size: ...}, "oracle": {...}, "cascade": {...}}`, where the last two have `accuracy`,
        `expected_dim`, `mean_layers` (None without exits) and `share`, the fraction of rows that stop at each size.
    """
    ladder = model.config.ladder
    logits, found = model.collect_logits(dataset, collator, batch_size, disable_tqdm)
    if not logits.isfinite().all():
        raise ValueError("model_name_or_path: the model's scores are not finite, so that no class is the highest")
    labels = cast(torch.Tensor, found)
    correct = logits.argmax(dim=-1) == labels
    accuracy = correct.double().mean(dim=1).tolist()
    results: dict[str, Any] = {"n": len(labels), "accuracy": {str(s): a for s, a in zip(ladder, accuracy, strict=True)}}
    results["oracle"] = oracle(correct, ladder)
    if model.config.thresholds is not None:
        outputs = [model.predict_cascade(batch) for batch in batches(model, dataset, collator, batch_size)]
        hits = _joined(outputs, "labels").cpu() == labels
        sizes = _joined(outputs, "sizes").cpu()
        results["cascade"] = _choice(hits, sizes, ladder)
        if model.config.exits:  # the layers that ran, which may differ from those of the sizes
            results["cascade"]["mean_layers"] = _joined(outputs, "layers").double().mean().item()
    return results


def oracle(correct: torch.Tensor, ladder: Sequence[Size]) -> dict[str, Any]:
    """The upper bound of any choice among the sizes.

    Each sample is taken at the smallest size that classifies it correctly, or at the smallest size if none does.

    Args:
        correct: (sizes, samples), bool.
        ladder: the sizes.

    Returns:
        `accuracy`, `expected_dim`, `mean_layers` and `share`, as in `evaluate_classifier`.
    """
    return _choice(correct.any(dim=0), correct.to(torch.uint8).argmax(dim=0), ladder)


def batches(
    model: MatryoshkaClassifier, dataset: Dataset, collator: Callable, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """The batches of a dataset on the model's device, without labels."""
    loader, device = DataLoader(dataset, batch_size, collate_fn=collator), execution_device(model)
    return [{name: value.to(device) for name, value in batch.items() if name != "labels"} for batch in loader]


def _joined(outputs: Sequence[CascadeOutput], name: str) -> torch.Tensor:
    return torch.cat([output[name] for output in outputs])


def _choice(hits: torch.Tensor, sizes: torch.Tensor, ladder: Sequence[Size]) -> dict[str, Any]:
    """Accuracy and costs if each sample is taken at its own size; `hits` and `sizes` are (samples,)."""
    shares = (sizes.bincount(minlength=len(ladder)).double() / len(sizes)).tolist()
    layers = [size.num_layers for size in ladder]
    return {
        "accuracy": hits.double().mean().item(),
        "expected_dim": sum(share * size.dim for share, size in zip(shares, ladder, strict=True)),
        "mean_layers": None if None in layers else sum(s * n for s, n in zip(shares, layers, strict=True)),
        "share": {str(size): share for size, share in zip(ladder, shares, strict=True)},
    }
