"""Training nested classifiers, and judging every size, the cascade and the best choice of sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer

from modeling_mrl import Size
from modeling_mrl.classifier import MatryoshkaClassifier

from ..shared.arguments import BestKeepingTrainingArguments
from ..shared.callbacks import EvaluateLastStep, StopSignals
from ..shared.checkpoints import CheckpointMixin
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin


@dataclass
class ClassifierTrainingArguments(BestKeepingTrainingArguments):
    """Arguments of [`ClassifierTrainer`]. Defaults that differ from transformers': batch size 32, warm-up over the
    first tenth, evaluation and checkpoints at each quarter with the best one (by the mean accuracy of all sizes) kept
    in the end, unused columns kept, and bf16 where the CPU has it."""

    sizes: list[str] | None = field(
        default=None,
        metadata={"help": "Nested sizes: dimensions (8 64 384), or layers by dimensions for heads on several exits "
                  "(2x64 6x384). Default: the ladder of a TwoDMSE folder, else the hidden size halved down to 8."},
    )  # fmt: skip
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples a step and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Examples a batch of the evaluation."})
    metric_for_best_model: str | None = field(
        default="accuracy_mean", metadata={"help": "Metric that chooses the best checkpoint."}
    )


class ClassifierTrainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, Trainer):
    """
    transformers' Trainer for a nested classifier: logs the loss of every size, and evaluates all of them.

    Args:
        model: a nested classifier.
        args: [`ClassifierTrainingArguments`].
        kwargs: passed to `Trainer`; `data_collator` makes batches with `labels`.
    """

    # compute_loss returns the mean of one batch; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, model: MatryoshkaClassifier, args: ClassifierTrainingArguments, eval_dataset=None, **kwargs):
        if eval_dataset is None:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        self.stop_signals = StopSignals()
        callbacks = [EvaluateLastStep(), self.stop_signals, *(kwargs.pop("callbacks", None) or [])]
        super().__init__(model=model, args=args, eval_dataset=eval_dataset, callbacks=callbacks, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss; those of its sizes go to the log."""
        outputs = model(**inputs)
        sizes = self.accelerator.unwrap_model(model).config.sizes
        losses = outputs.losses.detach()
        self.record(outputs.loss.detach(), {f"loss/{size}": loss for size, loss in zip(sizes, losses, strict=True)})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Accuracy of every size, `eval_accuracy_2x64`, ..., and their mean `eval_accuracy_mean`."""
        model, dataset = self.accelerator.unwrap_model(self.model), eval_dataset or self.eval_dataset
        batch = self.args.per_device_eval_batch_size
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
    model: MatryoshkaClassifier, dataset: Dataset, collator, batch_size: int = 32, disable_tqdm: bool | None = None
) -> dict:
    """Accuracy of every size, of the cascade where it is fitted, and of the oracle.

    Args:
        dataset: rows that `collator` makes batches with `labels` of; neither heads nor cascade have seen them.

    Returns:
        {"n": rows, "accuracy": {size: ...}, "oracle": {...}, "cascade": {...} or absent}; both rows hold `accuracy`,
        `expected_dim`, `mean_layers` (None without exits) and `share` {size: of the rows that stop there}.
    """
    ladder = model.config.ladder
    logits, labels = model.collect_logits(dataset, collator, batch_size, disable_tqdm)
    correct = logits.argmax(dim=-1) == labels
    accuracy = correct.double().mean(dim=1).tolist()
    results = {"n": len(labels), "accuracy": {str(s): a for s, a in zip(ladder, accuracy, strict=True)}}
    results["oracle"] = oracle(correct, ladder)
    if model.config.thresholds is not None:
        outputs = [model.predict_cascade(batch) for batch in batches(model, dataset, collator, batch_size)]
        hits = torch.cat([output.labels for output in outputs]).cpu() == labels
        sizes = torch.cat([output.sizes for output in outputs]).cpu()
        results["cascade"] = _choice(hits, sizes, ladder)
        if model.config.exits:  # what ran, not what the sizes promise
            results["cascade"]["mean_layers"] = torch.cat([o.layers for o in outputs]).double().mean().item()
    return results


def oracle(correct: torch.Tensor, ladder: Sequence[Size]) -> dict:
    """The best that any choice among the sizes could do: each sample at the smallest size that is right, and at the
    smallest of all where none is.

    Args:
        correct: (sizes, samples), bool.
    """
    return _choice(correct.any(dim=0), correct.to(torch.uint8).argmax(dim=0), ladder)


def batches(model, dataset: Dataset, collator, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The dataset's batches on the model's device, without labels."""
    loader = DataLoader(dataset, batch_size, collate_fn=collator)
    return [{name: value.to(model.device) for name, value in batch.items() if name != "labels"} for batch in loader]


def _choice(hits: torch.Tensor, sizes: torch.Tensor, ladder: Sequence[Size]) -> dict:
    """Accuracy and costs of samples at one size each, (samples,) both."""
    shares = (sizes.bincount(minlength=len(ladder)).double() / len(sizes)).tolist()
    layers = [size.num_layers for size in ladder]
    return {
        "accuracy": hits.double().mean().item(),
        "expected_dim": sum(share * size.dim for share, size in zip(shares, ladder, strict=True)),
        "mean_layers": None if None in layers else sum(s * n for s, n in zip(shares, layers, strict=True)),
        "share": {str(size): share for size, share in zip(ladder, shares, strict=True)},
    }
