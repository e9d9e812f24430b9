"""SmaeTrainer: transformers' Trainer for masked-autoencoder pre-training, evaluated at every size."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from modeling_2dmse.modeling_smae import StarbucksForMaskedAutoencoding

from ..shared.attention import AttentionMixin, UnreadMaskMixin
from ..shared.callbacks import SetEpoch, StopSignals
from ..shared.checkpoints import CheckpointMixin
from ..shared.mixin import check_model, given_or_default
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin
from .arguments import SmaeTrainingArguments
from .masking import IGNORED, MaskingCollator

PARTS = ("loss_mlm", "loss_mae", "accuracy_mlm", "accuracy_mae")


class SmaeTrainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, AttentionMixin, UnreadMaskMixin, Trainer):
    """Pre-trains a `StarbucksForMaskedAutoencoding`: the loss is the mean over all sizes, and every size is evaluated.

    Args:
        model: the model, with its tokenizer.
        args: the arguments, which also set the mask rates; without any, the defaults, written to `tmp_trainer`.
        train_dataset: texts (column `text`), or blocks from `trainer.smae.corpus.pack`. For an `IterableDataset`,
            `max_steps` must be set.
        eval_dataset: texts or blocks to evaluate on.
        **kwargs: passed to `Trainer`.

    Raises:
        ValueError: the tokenizer cannot be used for masking, a stream comes without `max_steps`, or FSDP is used.
    """

    args: SmaeTrainingArguments
    model: StarbucksForMaskedAutoencoding
    data_collator: MaskingCollator

    # compute_loss returns the mean of one batch; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: StarbucksForMaskedAutoencoding | None = None,
        args: SmaeTrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        model, args = check_model(model), given_or_default(args, SmaeTrainingArguments)
        tokenizer = model.encoder.tokenizer
        collator = MaskingCollator(
            tokenizer,
            min(args.max_length, model.encoder.max_length),
            args.mlm_probability,
            args.decoder_mlm_probability,
            args.seed,
            args.process_index,
        )
        if isinstance(train_dataset, IterableDataset):
            if args.max_steps < 1:
                raise ValueError("max_steps: a stream has no length; name the optimizer steps with --max_steps")
            # Batches of different lengths cannot be dispatched. (The arguments have made it an AcceleratorConfig.)
            cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
        train_dataset, eval_dataset = (as_arrays(table) for table in (train_dataset, eval_dataset))
        if eval_dataset is None:
            args.eval_strategy = "no"
        self.stop_signals = StopSignals()
        self.ladder = [str(size) for size in model.ladder]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[SetEpoch(collator), self.stop_signals, *(kwargs.pop("callbacks", None) or [])],
            **kwargs,
        )
        if self.is_fsdp_enabled:  # the loss multiplies by the complete matrix of word embeddings
            raise ValueError("fsdp: masked-autoencoder pre-training needs unsharded weights; use DDP")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model; the parts of every size are logged."""
        output = model(**inputs)
        parts = {f"{part}/{size}": value for part in PARTS for size, value in self._by_size(output[part])}
        self.record(output.loss.detach(), parts)
        return (output.loss, output) if return_outputs else output.loss

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate every size. The masks are the same each time, and hide every token that is to be predicted.

        Returns:
            `eval_loss`; for each size `eval_loss_mlm_1x32`, `eval_loss_mae_1x32`, `eval_accuracy_mlm_1x32` and
            `eval_accuracy_mae_1x32`, means over all masked tokens; and `eval_unigram_mlm` and `eval_unigram_mae`, the
            accuracy of always predicting the most frequent masked token.
        """
        collator = self.data_collator
        epoch, collator.epoch, collator.hides_all = collator.epoch, 0, True
        training = self.model.training
        self.model.eval()
        totals: dict[str, Any] = dict.fromkeys(PARTS, 0.0)
        words = {
            kind: torch.zeros(self.model.config.head["vocab_size"], dtype=torch.float64) for kind in ("mlm", "mae")
        }
        loader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = loader  # the progress bar's length
        for inputs in loader:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                output = self.model(**inputs)
            for kind, labels in (("mlm", inputs["labels"]), ("mae", inputs["decoder_labels"])):
                labels = labels[labels != IGNORED]
                words[kind] += labels.bincount(minlength=len(words[kind])).cpu()
                for part in (f"loss_{kind}", f"accuracy_{kind}"):
                    totals[part] += output[part].double().cpu() * len(labels)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(training)
        collator.epoch, collator.hides_all = epoch, False
        metrics = self._metrics(totals, words, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _metrics(self, totals: dict, words: dict[str, torch.Tensor], prefix: str) -> dict[str, float]:
        words = {kind: self._sum(count) for kind, count in words.items()}
        means = {part: self._sum(total) / words[part[-3:]].sum() for part, total in totals.items()}
        metrics = {f"{prefix}_loss": ((means["loss_mlm"] + means["loss_mae"]) / 2).mean().item()}
        for part, values in means.items():
            metrics |= {f"{prefix}_{part}_{size}": value.item() for size, value in self._by_size(values)}
        return metrics | {
            f"{prefix}_unigram_{kind}": (count.max() / count.sum()).item() for kind, count in words.items()
        }

    def _by_size(self, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self.ladder, values, strict=True)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(value.float().to(self.args.device), "sum").double().cpu()


def as_arrays(table):
    """A table of blocks whose rows are read as arrays instead of lists of numbers; any other table as it is."""
    return table.with_format("numpy") if table is not None and "input_ids" in (table.column_names or ()) else table
