"""M3Trainer: transformers' Trainer for nested visual tokens; the tower runs once, each level goes backward alone."""

import contextlib
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import Trainer

from modeling_m3 import MatryoshkaLlavaForConditionalGeneration, visual_output

from ..shared.arguments import BaseTrainingArguments
from ..shared.callbacks import StopSignals
from ..shared.checkpoints import CheckpointMixin
from ..shared.part_log import PartLogMixin
from ..shared.sampling import ResumableOrderMixin
from .conversations import ConversationCollator
from .levels import LevelScores, join_scores, score_batch


@dataclass
class M3TrainingArguments(BaseTrainingArguments):
    """Arguments of [`M3Trainer`]. The defaults that differ from transformers': learning rate 2e-5 on a cosine with
    warm-up over the first 0.03, as LLaVA-1.5 is tuned; bf16 where the CPU has it, unused columns kept, checkpoints and
    evaluations at each quarter."""

    visual_token_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Levels to train, for example 1 9 36. Default: the model's, which for stock LLaVA is the "
                  "grid's side divided by its smallest prime factor down to 1."},
    )  # fmt: skip
    scale_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each level's loss in the mean. Default: equal."}
    )
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Train projector and language model alone."})
    max_length: int = field(
        default=2048,
        metadata={"help": "Longest text in tokens, an image counted as one; longer ones are cut at the end."},
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Optimizer steps of warm-up; below 1, a share of all steps."}
    )

    def __post_init__(self):
        if self.max_length < 8:
            raise ValueError(f"max_length: {self.max_length} is not allowed; use a number of at least 8")
        super().__post_init__()


class M3Trainer(CheckpointMixin, ResumableOrderMixin, PartLogMixin, Trainer):
    """
    Trains a [`MatryoshkaLlavaForConditionalGeneration`] at all of its levels (Cai et al. 2024, equation 1).

    A step minimises the weighted mean over levels of the answers' cross-entropy. The vision tower runs once; then level
    after level, small to large, the language model runs forward and backward, so that its activations of one level at
    most are held at a time: the peak is that of a step at the largest level alone, and one tensor of image features.
    The gradients with respect to these features add up, and go through the tower once, with the largest level.

    Args:
        model: the model; its configuration's levels and weights are trained.
        args: [`M3TrainingArguments`].
        train_dataset, eval_dataset: rows from `trainer.conversations.check_conversations`.
        processing_class: LLaVA's processor, with a chat template.
        kwargs: passed to `Trainer`.

    Raises:
        ValueError: levels or weights that do not fit the model, a processor without a chat template, DeepSpeed or FSDP.
    """

    # training_step returns the mean of one batch and divides it by the accumulation steps itself.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: MatryoshkaLlavaForConditionalGeneration,
        args: M3TrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        **kwargs,
    ):
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
            data_collator=ConversationCollator(processing_class, list(self.level_shares), args.max_length),
            callbacks=[self.stop_signals, *(kwargs.pop("callbacks", None) or [])],
            **kwargs,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # DeepSpeed steps after one backward pass; FSDP gathers a projector's weights in the model's forward alone.
            raise ValueError("deepspeed, fsdp: a step runs parts of the model by themselves, several times; use DDP")

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one batch, level after level; the mean loss over levels."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        whole, parts, total = self._encode_images(inputs), {}, 0.0
        collected = None if whole is None else whole.detach().requires_grad_(whole.requires_grad)
        if whole is not None and whole.requires_grad and len(self.level_shares) > 1:
            whole.register_hook(lambda gradient: gradient + collected.grad)
        for index, (size, share) in enumerate(self.level_shares.items()):
            last = index == len(self.level_shares) - 1
            # Gradients travel between processes once, with the last level, which reaches every parameter.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self._level_loss(model, inputs["levels"][size], whole if last else collected, size)
                parts[f"loss/{size}"] = loss.detach()
                scaled = share * loss / self.current_gradient_accumulation_steps
                self.accelerator.backward(scaled)
            total = total + scaled.detach()
        self.record(total * self.current_gradient_accumulation_steps, parts)
        return total

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Score every level.

        Returns:
            `eval_loss`, the weighted mean over levels, and for each level `eval_loss_36`, the mean over the answers'
            tokens, and `eval_accuracy_36`, the share of rows that greedy decoding would answer word for word.
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
        """The features of all patches, with their graph unless tower and projector are frozen; None without images."""
        if "pixel_values" not in inputs:
            return None
        with self.accelerator.autocast():
            return self.accelerator.unwrap_model(self.model).encode_images(inputs["pixel_values"])

    def _level_loss(self, model, inputs: dict, features: torch.Tensor | None, size: int) -> torch.Tensor:
        if features is None:
            return model(**inputs).loss
        with self.accelerator.autocast():
            tokens = self.accelerator.unwrap_model(model).pool_images(features, size)
        return model(**inputs, mm_encoder_outputs={"image": visual_output(tokens)}).loss

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
