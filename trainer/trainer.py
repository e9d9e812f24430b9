"""TwoDMSETrainer: transformers' Trainer with an elastic loss and an evaluation at every size."""

import contextlib
import copy
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import set_seed
from transformers.utils import logging

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.packing import Packing
from modeling_2dmse.tokens import finish_tokenizer

from .arguments import TwoDMSETrainingArguments
from .averaging import average_with_initial
from .base_card import card_facts
from .compiling import compile_layers
from .data import texts_to_fit
from .description import describe_run
from .distributed import gather_rows, shard_by_layers
from .dropout import switch_off_dropout
from .exits import keep_last_gate, refine_trained
from .gradient_cache import CachedForward
from .guide import KEY, Guide
from .losses import Rows
from .model_card import Run, build_card, write_card
from .objectives import Objective, Plan
from .preparation import (
    check_arguments,
    check_checkpointing,
    check_optimizers,
    check_teacher,
    check_training_tables,
    find_encoder,
    make_block_sampler,
    make_collator,
    make_objective,
    prepare_rows,
    resolve_ladder,
    set_comparison,
    set_tokenizer,
)
from .projections import fit_exit_projections
from .scoring import ScoringMixin, Task, as_tasks
from .searching import SearchMixin
from .shared.attention import AttentionMixin
from .shared.callbacks import EvaluateLastStep, LogShortRuns, SetEpoch, StopSignals
from .shared.checkpoints import CheckpointMixin
from .shared.inference import evaluation_mode
from .shared.mixin import given_or_default
from .shared.part_log import PartLogMixin
from .step_loss import plan_gradient, plan_loss
from .teacher_embeddings import TeacherEmbeddings

logger = logging.get_logger(__name__)


class TwoDMSETrainer(SearchMixin, ScoringMixin, CheckpointMixin, PartLogMixin, AttentionMixin, Trainer):
    """Trains a `TwoDMSEModel` on tables of texts, at every size of its ladder.

    Args:
        model: the model, or a peft model around it; None with `model_init`.
        args: the arguments; `sizes`, if set, replaces the ladder of the model. Without any, the defaults, written to
            `tmp_trainer`.
        train_dataset: a `datasets.Dataset` with columns (anchor, positive[, negative ...]) or
            (sentence1, sentence2, score), or several such tables in a list or a dict. Each batch comes from one table.
        eval_dataset: a table with such columns, a dict of them by name, or a list of tasks from `trainer.evaluation`.
        processing_class: the tokenizer; by default the model's own.
        unlabeled_texts: texts without labels, of the kind that will be embedded. Each training row comes with one of
            them. The sizes also learn from their teacher on these texts, with the weight `unlabeled_weight`, and exit
            projections are fitted to them too.
        teacher_embeddings: the vectors that every size learns to reproduce, for the teacher `embeddings`.
        guide: an encoder that marks false negatives for `infonce` (GISTEmbed): a candidate that it puts nearer to an
            anchor than the anchor's positive is left out of the anchor's loss.
        model_init: makes the model, with the trial of a hyper-parameter search if it takes an argument. Each call of
            `train` starts from a new one.
        **kwargs: passed to `Trainer`.

    Raises:
        ValueError: the columns, the arguments, the guide and the model do not fit each other.
    """

    args: TwoDMSETrainingArguments
    # `objective` is the score of a trial in transformers' hyper-parameter search.
    training_objective: Objective
    train_dataset: Dataset
    eval_dataset: Any

    # compute_loss returns the mean of one batch; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TwoDMSETrainingArguments | None = None,
        train_dataset: Dataset | Sequence[Dataset] | Mapping[str, Dataset] | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | Sequence[Task] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        unlabeled_texts: Sequence[str] | None = None,
        guide: TwoDMSEModel | None = None,
        teacher_embeddings: TeacherEmbeddings | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs: Any,
    ):
        if (model is None) == (model_init is None):
            raise ValueError("model: give either model or model_init")
        args = given_or_default(args, TwoDMSETrainingArguments)
        check_arguments(args, kwargs)
        self.args = args
        self.model_init = cast(Callable[..., PreTrainedModel], model_init)  # which Trainer checks for None
        self._processing_class, self._unlabeled_texts = processing_class, unlabeled_texts
        self._guide_model, self._teacher_embeddings = guide, teacher_embeddings
        self._own_collator = kwargs.pop("data_collator", None)
        self._set_epoch, self._fit_projections = SetEpoch(None), False
        if model is None:
            set_seed(args.seed)
            model = self._first_model = self.call_model_init()
        self._take_model(model)
        self.train_tables = check_training_tables(train_dataset)
        check_optimizers(self.encoder, kwargs.get("optimizers"))
        # Before Trainer's own steps, so that impossible batches are refused before anything is written.
        self._take_data()
        tasks = as_tasks(eval_dataset)
        if not tasks:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        self._micro_step = (-1, 0)
        self._start: TwoDMSEModel | None = None
        self.stop_signals = StopSignals()
        super().__init__(
            model=None if model_init else model,
            args=args,
            train_dataset=self.train_dataset,
            eval_dataset=tasks,
            processing_class=self.encoder.tokenizer,
            model_init=model_init,
            data_collator=self.data_collator,
            callbacks=[
                *(EvaluateLastStep(), LogShortRuns(), self.stop_signals, self._set_epoch),
                *(kwargs.pop("callbacks", None) or []),
            ],
            **kwargs,
        )
        self._adapt_launch()

    def _take_model(self, model: PreTrainedModel) -> None:
        """Set the encoder, the ladder and the objective that belong to a model."""
        self.encoder = find_encoder(model)
        if not self.args.dropout:
            switch_off_dropout(self.encoder)
        self.ladder = resolve_ladder(self.encoder, self.args)
        self.encoder.config.set_ladder(self.ladder)
        set_comparison(self.encoder, self.args)
        set_tokenizer(self.encoder, self._processing_class)
        self._prepare_projections(model, self.args)
        self.training_objective = make_objective(
            self.encoder, self.ladder, self.args, self._unlabeled_texts is not None
        )

    def _take_data(self) -> None:
        """Set the rows, their collator and their order, which the arguments decide."""
        args, guide, teacher = self.args, self._guide_model, self._teacher_embeddings
        rows, collator = None, self._own_collator
        if self.train_tables:
            rows = prepare_rows(self.train_tables, args, self.ladder, self._unlabeled_texts)
            check_teacher(args, teacher, guide)
            collator = collator or make_collator(self.encoder.tokenizer, rows, self.encoder, args, guide, teacher)
        self.guide = None if guide is None else Guide(guide, args)
        self.train_dataset, self.data_collator = rows, collator
        self.block_sampler = self._set_epoch.target = make_block_sampler(self.train_tables, args)

    def _adapt_launch(self) -> None:
        args = self.args
        shard_by_layers(self.accelerator, self.encoder)
        self._check_launch()
        if args.torch_compile:
            compile_layers(self.accelerator, self.encoder, str(args.torch_compile_backend), args.torch_compile_mode)

    def _prepare_projections(self, model: PreTrainedModel, args: TwoDMSETrainingArguments) -> None:
        """Add exit projections, if the arguments ask for them and the model has none."""
        self._fit_projections = args.exit_projections and self.encoder.exit_projections is None
        if self._fit_projections:
            if self.encoder is not model:
                raise ValueError(
                    "exit_projections: fit them before adding adapters, with fit_exit_projections(encoder, texts)"
                )
            self.encoder.add_exit_projections()
        projected = self.encoder.exit_projections is not None
        if (projected or args.shallow_steps) and args.ddp_find_unused_parameters is None:
            # A step may leave some parameters out, but with gradient checkpointing transformers tells DDP that none is.
            args.ddp_find_unused_parameters = True

    def _check_launch(self) -> None:
        """ValueError if the arguments need something that adapters, FSDP or DeepSpeed do not allow."""
        if self.encoder is not self.model and self.is_fsdp_enabled:
            raise ValueError("model: adapters cannot be trained under FSDP; use DDP, whose memory suffices for them")
        needs = {
            "initial_share: the average": self.args.initial_share,
            "teacher: start": self.args.teacher == "start",
            "refine_projections: the refining": self.args.refine_projections,
            "exit_gates: their fit": self._adds_gates,
        }
        for what, asked in needs.items():
            if asked and (self.encoder is not self.model or self.is_deepspeed_enabled or self.is_fsdp_enabled):
                raise ValueError(f"{what} needs all weights in one process, without adapters, FSDP or DeepSpeed")
        check_checkpointing(self.args)
        if self.args.gradient_cache_chunk_size is not None and self.is_deepspeed_enabled:
            raise ValueError("gradient_cache_chunk_size: DeepSpeed allows one backward pass per step; use DDP or FSDP")

    @property
    def loss_scale(self) -> float:
        """The factor of the similarities in the loss."""
        return cast(float, self.args.loss_scale)

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.block_sampler is None else self.block_sampler

    def train(self, *args, **kwargs):
        """Train as `Trainer` does, with the arguments of `Trainer.train`.

        New projections (`exit_projections`) are fitted before the first step. When a run is complete, its weights are
        averaged with the initial weights (`initial_share`), which include the fitted projections. Then the projections
        of the exits are refined, that of the last one by a rotation (`refine_projections`), with `exit_gates` together
        with new gates, and those of exits that no step has trained are fitted again.

        Evaluations and checkpoints during the run, and the choice of the best checkpoint, use the weights before these
        last steps.
        """
        if self.model_init is None:
            self._before_training()  # else with the new model
        output = super().train(*args, **kwargs)
        fitted, initial = self._fitted, self._initial
        if initial is not None:
            average_with_initial(self.encoder, initial, self.args.initial_share, self.args.initial_share_by_layer)
        if self.args.refine_projections or self._adds_gates:
            self._refine_on_training_texts()
        others = set(range(1, self.encoder.num_layers + 1)).difference(self.training_objective.exits)
        if fitted and others and self.is_fsdp_enabled:
            logger.warning(
                f"exit_projections: the exits {sorted(others)}, which are not on the ladder, keep their initial fit, "
                "because FSDP shards the weights; run fit_exit_projections on the saved model to fit them again"
            )
        elif fitted and others:  # the layers before these exits have moved
            self._fit_on_training_texts(sorted(others))
        return output

    def _before_training(self) -> None:
        """Fit new projections, and keep what is needed of the initial weights."""
        self._fitted, self._initial = self._fit_projections, None
        if self._fitted:
            self._fit_on_training_texts()
        keep_last_gate(self.encoder)
        if self.args.initial_share:
            parameters = self.encoder.named_parameters()
            self._initial = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters}
        if self.args.teacher == "start":
            start = copy.deepcopy(self.encoder)
            start.to(self.args.device)  # type: ignore[arg-type]  # the type of transformers' wrapper is wrong
            self._start = start.eval().requires_grad_(False)

    def _fit_on_training_texts(self, layers: Sequence[int] | None = None) -> None:
        with evaluation_mode(self.encoder):
            fit_exit_projections(self.encoder, self._texts_to_fit(), layers=layers, **self._encoding())
        self._fit_projections = False

    @property
    def _adds_gates(self) -> bool:
        """Whether exits get gates after training; those that the model has are trained with the rest."""
        return self.args.exit_gates and self.encoder.exit_gates is None

    def _texts_to_fit(self) -> list[str]:
        return texts_to_fit(self.train_tables, self.train_dataset, self.args.seed, self.encoder.config.prompts)

    def _encoding(self) -> dict[str, Any]:
        """How the texts of a fit are encoded."""
        return {
            "max_length": self.args.max_length,
            "batch_size": self.args.per_device_eval_batch_size,
            "show_progress_bar": False if self.args.disable_tqdm else None,
        }

    def _refine_on_training_texts(self) -> None:
        """Refine the exits, and rotate the last one, towards the trained full size and the teacher of the steps."""
        texts, teacher, options = self._texts_to_fit(), None, self._encoding()
        with evaluation_mode(self.encoder):
            if self._teacher_embeddings is not None:
                teacher = self._teacher_embeddings(texts)
            elif self._start is not None:
                teacher = self._start.encode_states(texts, [self._start.num_layers], **options)[0]
            refine_trained(self.encoder, texts, self.ladder, teacher, self.args.exit_gates, self.args.seed, **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the objective on one batch; all columns go through one call of the wrapped model."""
        inputs, lengths, rows, plan, targets = self._step(inputs)
        outputs = model(**inputs, layers=plan.layers, **self._buckets(inputs, lengths))
        start = self._start_state(plan, inputs, lengths) if targets is None else targets
        states, start, rows = self._join(outputs.layer_embeddings, start, rows)
        loss, parts = plan_loss(plan, states, rows, str(self.args.loss), self.loss_scale, start)
        self.record(loss, parts)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of one batch, in chunks if `gradient_cache_chunk_size` is set."""
        if self.args.gradient_cache_chunk_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs, lengths, rows, plan, targets = self._step(self._prepare_inputs(inputs))

        def forward(chunk: dict[str, torch.Tensor]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return model(**chunk, layers=plan.layers).layer_embeddings

        chunk_rows = (len(rows.counts) + bool(rows.unlabeled)) * self.args.gradient_cache_chunk_size
        cached = CachedForward(forward, inputs, chunk_rows, lengths)
        states = cached.states().requires_grad_()
        start = self._start_state(plan, inputs, lengths, chunk_rows) if targets is None else targets
        joined, start, rows = self._join(states, start, rows)
        loss, parts, gradient = plan_gradient(plan, joined, rows, str(self.args.loss), self.loss_scale, start)
        self.record(loss, parts)
        joined.backward(gradient / self.current_gradient_accumulation_steps)

        def run(scalar: Callable[[], torch.Tensor], last: bool) -> None:
            # The processes exchange gradients once, with the last chunk.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                self.accelerator.backward(scalar())

        cached.backward(cast(torch.Tensor, states.grad), run)
        return loss / self.current_gradient_accumulation_steps

    @torch.no_grad()
    def _start_state(self, plan: Plan, inputs: dict, lengths, chunk_rows: int | None = None) -> torch.Tensor | None:
        """(rows, H), the states of the model before training after the teacher's layers; None if it is no teacher."""
        alignments = plan.alignments or plan.unlabeled
        if self._start is None or not alignments:
            return None
        layers = (alignments[0].teacher.num_layers,)
        with self.accelerator.autocast():
            if chunk_rows is None:
                return self._start(**inputs, layers=layers, **self._buckets(inputs, lengths)).layer_embeddings[0]
            forward = lambda chunk: self._start(**chunk, layers=layers).layer_embeddings
            return CachedForward(forward, inputs, chunk_rows, lengths).states()[0]

    def _join(self, states: torch.Tensor, start: torch.Tensor | None, rows: Rows):
        """States, start and rows of all processes, if `gather_negatives` is set; otherwise those of this process."""
        if start is not None:
            states = torch.cat((states, start[None]))
        states, rows = gather_rows(states, rows) if self.args.gather_negatives else (states.view_as(states), rows)
        return (states, None, rows) if start is None else (states[:-1], states[-1].detach(), rows)

    def _step(self, inputs: dict) -> tuple[dict, list[int] | None, Rows, Plan, torch.Tensor | None]:
        """The inputs of the model, the lengths and roles of their rows, the plan, and the given teacher's vectors."""
        inputs = dict(inputs)
        with self.accelerator.autocast():
            guide = None if self.guide is None else self.guide.embeddings(inputs.pop(KEY))
        rows = Rows.of_batch(inputs, guide)
        lengths, targets = inputs.pop("lengths", None), inputs.pop("targets", None)
        if "attention_mask" not in inputs:
            inputs["packing"] = Packing(lengths, inputs["input_ids"].device)
        return inputs, lengths, rows, self.training_objective.plan(self._step_generator()), targets

    def _buckets(self, inputs: dict, lengths: list[int] | None) -> dict[str, Any]:
        """How the rows of a padded batch run; those of a packed one run as they are."""
        return {} if "packing" in inputs else {"num_buckets": self.args.num_buckets, "lengths": lengths}

    def describe(self) -> dict[str, object]:
        """The settings that a model card shows."""
        return describe_run(self)

    def create_model_card(self, language=None, license=None, *args, model_name=None, finetuned_from=None, **kwargs):
        """Write the model card of this project, unless a script has already written a more complete one. Language,
        licence and base model are those given, or else those that the card of the backbone names."""
        folder = str(self.args.output_dir)
        if not self.is_world_process_zero() or os.path.exists(os.path.join(folder, "README.md")):
            return
        # Under FSDP, one process cannot run the model.
        can_evaluate = self.eval_dataset and not self.is_fsdp_enabled
        results = self.results(self.eval_dataset, self.ladder) if can_evaluate else {}
        name = model_name or os.path.basename(os.path.normpath(folder))
        facts: dict = card_facts(self.encoder.config.name_or_path, finetuned_from, license, language)
        run = Run(name, self.describe(), results, repo_id=self.args.hub_model_id, **facts)
        write_card(folder, build_card(self.encoder, self.training_objective, run))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # Trainer has saved the tokenizer once more.
        finish_tokenizer(output_dir or str(self.args.output_dir), self.encoder.tokenizer, self.encoder.max_length)
        if self.encoder is not self.model:
            # The folder of an adapter also gets the configuration of the model that it adapts.
            self.encoder.config.save_pretrained(output_dir or str(self.args.output_dir))

    def _step_generator(self) -> random.Random:
        """A generator that depends only on the seed and the step: the same in every process and after a resume."""
        step, micro = self._micro_step
        self._micro_step = (step, micro + 1) if step == self.state.global_step else (self.state.global_step, 0)
        return random.Random(f"{self.args.seed}-{self._micro_step[0]}-{self._micro_step[1]}")
