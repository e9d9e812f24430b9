"""M3Trainer: transformers' Trainer for nested visual tokens, with one backward pass per level."""

import contextlib
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration, visual_output

from ..shared.attention import UnreadMaskMixin, nothing_padded
from ..shared.callbacks import StopSignals
from ..shared.checkpoints import CheckpointMixin
from ..shared.mixin import check_model, given_or_default
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin
from .arguments import M3TrainingArguments
from .conversations import ConversationCollator
from .levels import LevelScores, join_scores, score_batch

# Conversations whose tokens are kept; 500 tokens of each take about half a gigabyte.
_KEPT_CONVERSATIONS = 100_000


class M3Trainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, UnreadMaskMixin, Trainer):
    """Trains a `MatryoshkaLlavaForConditionalGeneration` at all of its levels (Cai et al. 2024, equation 1).

    A step minimizes the weighted mean over the levels of the cross-entropy of the answers. The vision tower runs once.
    Then the language model runs forward and backward for one level after another, from small to large, so that its
    activations of only one level are in memory. The peak is that of a step at the largest level, plus one tensor of
    image features. The gradients with respect to these features are added, and go through the tower once, with the last
    level.

    Args:
        model: the model; its configuration sets the levels and their weights, unless the arguments do.
        args: the arguments; without any, the defaults, written to `tmp_trainer`.
        train_dataset: rows from `trainer.m3.conversations.check_conversations`.
        eval_dataset: rows to evaluate on.
        processing_class: LLaVA's processor, with a chat template.
        **kwargs: passed to `Trainer`.

    Raises:
        ValueError: levels or weights do not fit the model, the processor has no chat template, or DeepSpeed or FSDP is
            used.
    """

    args: M3TrainingArguments
    model: MatryoshkaLlavaForConditionalGeneration

    # training_step returns the mean of one batch and divides it by the accumulation steps itself.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: MatryoshkaLlavaForConditionalGeneration | None = None,
        args: M3TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        model, args = check_model(model), given_or_default(args, M3TrainingArguments)
        if args.visual_token_sizes is not None or args.scale_loss_weights is not None:
            sizes = args.visual_token_sizes or model.config.visual_token_sizes
            model.config.set_levels(sizes, args.scale_loss_weights)
        if args.freeze_vision_tower:
            model.model.vision_tower.requires_grad_(False)
        if eval_dataset is None:
            args.eval_strategy = "no"
        self.level_shares = model.config.level_shares
        self.stop_signals = StopSignals()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=ConversationCollator(
                processing_class, list(self.level_shares), args.max_length, _is_read_again(train_dataset, args)
            ),
            callbacks=[self.stop_signals, *(kwargs.pop("callbacks", None) or [])],
            **kwargs,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # DeepSpeed allows one backward pass per step; FSDP gathers weights only in the forward of the whole model.
            raise ValueError("deepspeed, fsdp: a step runs parts of the model separately, several times; use DDP")

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of one batch, one level after another; returns the mean loss over the levels."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        whole, parts = self._encode_images(inputs), {}
        total: Any = 0.0
        collected = None
        if whole is not None:
            collected = features = whole.detach().requires_grad_(whole.requires_grad)
            if whole.requires_grad and len(self.level_shares) > 1:
                whole.register_hook(lambda gradient: gradient + features.grad)
        for index, (size, share) in enumerate(self.level_shares.items()):
            last = index == len(self.level_shares) - 1
            # The processes exchange gradients once, with the last level, which reaches every parameter.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                level, images = inputs["levels"][size], whole if last else collected
                loss = self._level_loss(model, level, images, size, size in inputs["padded"])
                parts[f"loss/{size}"] = loss.detach()
                scaled = share * loss / self.current_gradient_accumulation_steps
                self.accelerator.backward(scaled)
            total = total + scaled.detach()
        self.record(total * self.current_gradient_accumulation_steps, parts)
        return total

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate every level.

        Returns:
            `eval_loss`, the weighted mean over the levels; and for each level `eval_loss_36`, the mean over the tokens
            of the answers, and `eval_accuracy_36`, the fraction of rows that greedy decoding would answer exactly.
        """
        training = self.model.training
        self.model.eval()
        batches = []
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                batches.append(score_batch(self.model, inputs))
        self.model.train(training)
        metrics = self._metrics(join_scores(batches), metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _encode_images(self, inputs: dict) -> torch.Tensor | None:
        """The features of all patches, with a graph unless tower and projector are frozen; None without images."""
        if "pixel_values" not in inputs:
            return None
        with self.accelerator.autocast():
            return self.accelerator.unwrap_model(self.model).encode_images(inputs["pixel_values"])

    def _level_loss(self, model, inputs: dict, features: torch.Tensor | None, size: int, padded: bool) -> torch.Tensor:
        given = {}
        if features is not None:
            with self.accelerator.autocast():
                tokens = self.accelerator.unwrap_model(model).pool_images(features, size)
            given["mm_encoder_outputs"] = {"image": visual_output(tokens)}
        with contextlib.nullcontext() if padded else nothing_padded():
            return model(**inputs, **given).loss

    def _metrics(self, levels: dict[int, LevelScores], prefix: str) -> dict[str, float]:
        metrics = {f"{prefix}_loss": 0.0}
        for size, scores in levels.items():
            sums = torch.stack([scores.loss_sum.sum(), scores.tokens.sum(), scores.correct.sum()]).double()
            sums = torch.cat([sums, torch.tensor([len(scores.correct)], dtype=torch.float64)])
            loss, tokens, correct, rows = self.accelerator.reduce(sums.float().to(self.args.device), "sum").tolist()
            metrics[f"{prefix}_loss_{size}"] = loss / tokens
            metrics[f"{prefix}_accuracy_{size}"] = correct / rows
            metrics[f"{prefix}_loss"] += self.level_shares[size] * loss / tokens
        return metrics


def _is_read_again(rows: Dataset | None, args: M3TrainingArguments) -> bool:
    """Whether a run reads rows more than once, and they are few enough to keep their tokens."""
    if rows is None or len(rows) > _KEPT_CONVERSATIONS:
        return False
    return args.num_train_epochs > 1 or args.max_steps * args.gradient_accumulation_steps * args.train_batch_size > len(
        rows
    )
