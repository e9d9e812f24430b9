"""TwoDMSETrainer: transformers' Trainer with an elastic loss and an evaluation at every size."""

import contextlib
import copy
import os
import random
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from modeling_2dmse import Size, TwoDMSEModel, parse_ladder

from .arguments import TwoDMSETrainingArguments
from .averaging import average_with_initial
from .data import (
    PairCollator,
    add_unlabeled_texts,
    check_table,
    join_tables,
    rescale_scores,
    text_columns,
    texts_to_fit,
)
from .distributed import gather_rows, shard_by_layers
from .dropout import switch_off_dropout
from .evaluation import RetrievalData, StsData, evaluate_tasks, main_scores, mean_scores, task_from_table
from .gradient_cache import CachedForward
from .losses import PAIR_LOSSES, SCALE, SCORE_LOSSES, Rows
from .model_card import Run, build_card, write_card
from .objectives import Objective, Plan, plan_gradient, plan_loss
from .projections import fit_exit_projections
from .shared.callbacks import EvaluateLastStep, StopSignals, TellEpoch
from .shared.checkpoints import CheckpointMixin
from .shared.part_log import PartLogMixin
from .shared.sampling import make_block_sampler

logger = logging.get_logger(__name__)

Task = StsData | RetrievalData


class TwoDMSETrainer(CheckpointMixin, PartLogMixin, Trainer):
    """
    Trains a [`TwoDMSEModel`] on tables of texts.

    Args:
        model: the model, or a peft model around it.
        args: [`TwoDMSETrainingArguments`].
        train_dataset: a `datasets.Dataset` with columns (anchor, positive[, negative ...]) or
            (sentence1, sentence2, score), or a list of such, of which each batch draws from one.
        eval_dataset: a dataset with such columns, or a list of tasks from `trainer.evaluation`; `evaluate` returns
            Spearman or nDCG@10 of every ladder size, and their mean as `eval_ladder_mean`.
        processing_class: the tokenizer; the model's own when left out.
        unlabeled_texts: texts without labels, of the kind that will be embedded. Each training row comes with one of them:
            sizes learn from their teacher on these as well, with the factor `unlabeled_weight`, and projections are fitted
            to them too.
        kwargs: passed to `Trainer`.

    Raises:
        ValueError: columns, loss and objective do not fit each other, or a size does not fit the model.
    """

    # compute_loss returns the mean of one batch; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TwoDMSETrainingArguments,
        train_dataset: Dataset | Sequence[Dataset] | None = None,
        eval_dataset: Dataset | Sequence[Task] | None = None,
        processing_class=None,
        unlabeled_texts: Sequence[str] | None = None,
        **kwargs,
    ):
        self.encoder = find_encoder(model)
        if not args.dropout:
            switch_off_dropout(self.encoder)
        self.ladder = resolve_ladder(self.encoder, args)
        self.encoder.config.set_ladder(self.ladder)
        tokenizer = processing_class if processing_class is not None else self.encoder.tokenizer
        self.encoder.tokenizer = tokenizer
        columns = None
        self.train_tables = []
        if train_dataset is not None:
            tables = [train_dataset] if isinstance(train_dataset, Dataset) else train_dataset
            self.train_tables = [check_table(table, "train_dataset") for table in tables]
            train_dataset = join_tables(self.train_tables)
            args.loss = resolve_loss(args.loss, train_dataset, self.ladder, args.objective)
            if args.loss == "cosine_mse":
                train_dataset, highest = rescale_scores(train_dataset)
                logger.info(f"cosine_mse: scores were divided by {highest:g}")
            if unlabeled_texts is not None:
                batch = args.per_device_train_batch_size
                train_dataset = add_unlabeled_texts(train_dataset, unlabeled_texts, args.seed, batch)
            columns = text_columns(train_dataset)
        if isinstance(eval_dataset, Dataset):
            eval_dataset = [task_from_table("eval", check_table(eval_dataset, "eval_dataset"))]
        self._fit_projections = args.exit_projections and self.encoder.exit_projections is None
        if self._fit_projections:
            self._add_projections(model)
        if self.encoder.exit_projections is not None and args.ddp_find_unused_parameters is None:
            # A step leaves some out, where transformers, under gradient checkpointing, tells DDP that none is.
            args.ddp_find_unused_parameters = True
        self.objective = Objective(
            name=args.objective,
            ladder=self.ladder,
            num_layers=self.encoder.num_layers,
            hidden_size=self.encoder.config.hidden_size,
            alignment=args.alignment,
            alignment_weight=args.alignment_weight,
            compression_dim=args.compression_dim,
            teacher=args.teacher,
            cross_size_weight=args.cross_size_weight,
            unlabeled_weight=0.0 if unlabeled_texts is None else args.unlabeled_weight,
        )
        if args.cross_size_weight and not self.objective.plan(random.Random(0)).crosses:
            raise ValueError(f"cross_size_weight: {args.objective} trains no shallower size to cross with the deepest")
        if args.teacher == "start" and self.objective.kind != "score_kl":
            raise ValueError(f"teacher: start teaches by the alignment score_kl, not by {self.objective.kind}")
        if unlabeled_texts is not None and not self.objective.plan(random.Random(0)).unlabeled:
            raise ValueError(
                f"unlabeled_texts: {args.objective} learns nothing from them with the alignment {self.objective.kind} and "
                f"unlabeled_weight {args.unlabeled_weight:g}"
            )
        if not eval_dataset:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        self._micro_step, self._start = (-1, 0), None
        self.stop_signals = StopSignals()
        collator = kwargs.pop("data_collator", None)
        if collator is None and columns is not None:
            collator = PairCollator(tokenizer, columns, min(args.max_length, self.encoder.max_length))
        # Made here, so that impossible batches are refused before anything is written.
        self.block_sampler = make_block_sampler(self.train_tables, args)
        tell_epoch = [TellEpoch(self.block_sampler)] if self.block_sampler is not None else []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=collator,
            callbacks=[EvaluateLastStep(), self.stop_signals, *tell_epoch, *(kwargs.pop("callbacks", None) or [])],
            **kwargs,
        )
        shard_by_layers(self.accelerator, self.encoder)
        if self.encoder is not model and self.is_fsdp_enabled:
            raise ValueError("model: adapters are not trained under FSDP; use DDP, which holds little for them")
        if args.initial_share:
            self._check_whole("initial_share: whole weights are averaged")
        if args.teacher == "start":
            self._check_whole("teacher: start is a copy of whole weights")
        if args.gradient_cache_chunk_size is not None and self.is_deepspeed_enabled:
            raise ValueError("gradient_cache_chunk_size: DeepSpeed steps after one backward pass; use DDP or FSDP")

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.block_sampler is None else self.block_sampler

    def _check_whole(self, what: str) -> None:
        if self.encoder is not self.model or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(f"{what}, not adapters nor what FSDP or DeepSpeed split")

    def train(self, *args, **kwargs):
        """Train as `Trainer` does, behind fitting new projections (`exit_projections`). A run that comes to its end is
        then averaged with its start (`initial_share`), that is with the fitted projections and the weights before, and
        the projections of exits that no step has trained are fitted anew.

        Evaluations and checkpoints on the way, and the choice of the best one, see the weights as they are trained.
        """
        fitted = self._fit_projections
        if fitted:
            self._fit_on_training_texts()
        initial = None
        if self.args.initial_share:
            parameters = self.encoder.named_parameters()
            initial = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters}
        if self.args.teacher == "start":
            self._start = copy.deepcopy(self.encoder).to(self.args.device).eval().requires_grad_(False)
        output = super().train(*args, **kwargs)
        if self.stop_signals.received is not None:
            return output
        if initial is not None:
            average_with_initial(self.encoder, initial, self.args.initial_share)
        others = set(range(1, self.encoder.num_layers + 1)).difference(self.objective.exits)
        if fitted and others and self.is_fsdp_enabled:
            logger.warning(
                f"exit_projections: the exits {sorted(others)}, off the ladder, keep those of the start, since FSDP "
                "holds weights in pieces; fit_exit_projections on the saved model fits them anew"
            )
        elif fitted and others:  # the layers before these exits have moved
            self._fit_on_training_texts(sorted(others))
        return output

    def _add_projections(self, model) -> None:
        if self.encoder is not model:
            raise ValueError(
                "exit_projections: fit them before adding adapters, by fit_exit_projections(encoder, texts)"
            )
        self.encoder.add_exit_projections()

    def _fit_on_training_texts(self, layers: Sequence[int] | None = None) -> None:
        fit_exit_projections(
            self.encoder,
            texts_to_fit(self.train_tables, self.train_dataset, self.args.seed),
            layers=layers,
            max_length=self.args.max_length,
            batch_size=self.args.per_device_eval_batch_size,
            show_progress_bar=False if self.args.disable_tqdm else None,
        )
        self._fit_projections = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss on one batch; all columns go through one call of the wrapped model."""
        inputs, lengths, rows, plan = self._step(inputs)
        outputs = model(**inputs, layers=plan.layers, num_buckets=self.args.num_buckets, lengths=lengths)
        start = self._start_state(plan, inputs, lengths)
        states, start, rows = self._join(outputs.layer_embeddings, start, rows)
        loss, parts = plan_loss(plan, states, rows, self.args.loss, self.args.loss_scale, start)
        self.record(loss, parts)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one batch, in chunks where `gradient_cache_chunk_size` is set."""
        if self.args.gradient_cache_chunk_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs, lengths, rows, plan = self._step(self._prepare_inputs(inputs))

        def forward(chunk: dict[str, torch.Tensor]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return model(**chunk, layers=plan.layers).layer_embeddings

        chunk_rows = (len(rows.counts) + bool(rows.unlabeled)) * self.args.gradient_cache_chunk_size
        cached = CachedForward(forward, inputs, chunk_rows, lengths)
        states = cached.states().requires_grad_()
        start = self._start_state(plan, inputs, lengths, chunk_rows)
        joined, start, rows = self._join(states, start, rows)
        loss, parts, gradient = plan_gradient(plan, joined, rows, self.args.loss, self.args.loss_scale, start)
        self.record(loss, parts)
        joined.backward(gradient / self.current_gradient_accumulation_steps)

        def run(scalar: Callable[[], torch.Tensor], last: bool) -> None:
            # Gradients travel between processes once, with the last chunk.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                self.accelerator.backward(scalar())

        cached.backward(states.grad, run)
        return loss / self.current_gradient_accumulation_steps

    @torch.no_grad()
    def _start_state(self, plan: Plan, inputs: dict, lengths, chunk_rows: int | None = None) -> torch.Tensor | None:
        """(rows, H), what the model before training says behind the teacher's layers; None where it does not teach."""
        alignments = plan.alignments or plan.unlabeled
        if self._start is None or not alignments:
            return None
        layers = (alignments[0].teacher.num_layers,)
        with self.accelerator.autocast():
            if chunk_rows is None:
                settings = {"num_buckets": self.args.num_buckets, "lengths": lengths}
                return self._start(**inputs, layers=layers, **settings).layer_embeddings[0]
            forward = lambda chunk: self._start(**chunk, layers=layers).layer_embeddings
            return CachedForward(forward, inputs, chunk_rows, lengths).states()[0]

    def _join(self, states: torch.Tensor, start: torch.Tensor | None, rows: Rows):
        """The same of all processes, where they are to be gathered: states, start, rows."""
        if start is not None:
            states = torch.cat((states, start[None]))
        states, rows = gather_rows(states, rows) if self.args.gather_negatives else (states.view_as(states), rows)
        return (states, None, rows) if start is None else (states[:-1], states[-1].detach(), rows)

    def _step(self, inputs: dict) -> tuple[dict, list[int] | None, Rows, Plan]:
        """The model's inputs, their rows' lengths and roles, and what the objective does in this step."""
        inputs = dict(inputs)
        rows = Rows(tuple(inputs.pop("counts")), inputs.pop("scores", None), inputs.pop("unlabeled", 0))
        lengths = inputs.pop("lengths", None)
        if self.args.torch_compile:
            lengths = None  # numbers from outside would be compiled in, anew in each step
        return inputs, lengths, rows, self.objective.plan(self._step_generator())

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Score every ladder size on the evaluation tasks.

        Returns:
            `eval_spearman_1x32` or `eval_ndcg@10_1x32`, ... (with the task's name in between when there are
            several), and `eval_ladder_mean`.
        """
        tasks = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(tasks, Dataset):
            tasks = [task_from_table("eval", check_table(tasks, "eval_dataset"))]
        if not tasks:
            raise ValueError("eval_dataset: there is none; pass one to the trainer or to evaluate")
        metrics = self.score(tasks, self.ladder, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, tasks: Sequence[Task], sizes: Sequence[Size], prefix: str = "eval") -> dict[str, float]:
        """The metrics of `evaluate`, without logging them."""
        results = self.results(tasks, sizes)
        metrics = {}
        for task in tasks:
            metric = "spearman" if isinstance(task, StsData) else "ndcg@10"
            name = metric if len(tasks) == 1 else f"{task.name}_{metric}"
            for size, value in main_scores(results)[task.name].items():
                metrics[f"{prefix}_{name}_{size}"] = value
        means = mean_scores(results)
        metrics[f"{prefix}_ladder_mean"] = sum(means.values()) / len(means)
        return metrics

    def results(self, tasks: Sequence[Task], sizes: Sequence[Size], **encode) -> dict:
        """All metrics of all tasks at the given sizes, as `results.json` holds them."""
        encode.setdefault("batch_size", self.args.per_device_eval_batch_size)
        encode.setdefault("max_length", self.args.max_length)
        if self.args.disable_tqdm:
            encode.setdefault("show_progress_bar", False)
        return evaluate_tasks(self.encoder, tasks, sizes, **encode)

    def describe(self) -> dict[str, object]:
        """The settings that a model card shows."""
        args = self.args
        return {
            "rows": len(self.train_dataset),
            "sizes": " ".join(map(str, self.ladder)),
            "loss": args.loss,
            "alignment": self.objective.kind,
            "batch size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "steps": self.state.max_steps,
            "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
            "max_length": args.max_length,
            "seed": args.seed,
        } | {
            name: value
            for name, value, default in (
                ("alignment weight", args.alignment_weight, None),
                ("teacher", args.teacher, "largest"),
                ("exit projections", args.exit_projections, False),
                ("initial share", args.initial_share, 0),
                ("loss scale", args.loss_scale, SCALE),
                ("dropout", args.dropout, True),
                ("weight on unlabeled texts", self.objective.unlabeled_weight, 0),
            )
            if value != default
        }

    def create_model_card(self, model_name=None, license=None, finetuned_from=None, **kwargs):
        """Write this project's card, unless a script has written a fuller one."""
        if not self.is_world_process_zero() or os.path.exists(os.path.join(self.args.output_dir, "README.md")):
            return
        # Under FSDP this process alone cannot run the model.
        alone = self.eval_dataset and not self.is_fsdp_enabled
        results = self.results(self.eval_dataset, self.ladder) if alone else {}
        name = model_name or os.path.basename(os.path.normpath(self.args.output_dir))
        run = Run(name, self.describe(), results, base_model=finetuned_from, license=license)
        write_card(self.args.output_dir, build_card(self.encoder, self.objective, run))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.encoder is not self.model:
            # Beside an adapter, so that the folder says what kind of model it adapts.
            self.encoder.config.save_pretrained(output_dir or self.args.output_dir)

    def _step_generator(self) -> random.Random:
        """A generator that depends on the seed and the position alone: the same in every process and after a resume."""
        step, micro = self._micro_step
        self._micro_step = (step, micro + 1) if step == self.state.global_step else (self.state.global_step, 0)
        return random.Random(f"{self.args.seed}-{self._micro_step[0]}-{self._micro_step[1]}")


def find_encoder(model: PreTrainedModel) -> TwoDMSEModel:
    """The TwoDMSEModel itself, or the one inside a peft model."""
    encoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(encoder, TwoDMSEModel):
        raise ValueError(f"model: a TwoDMSEModel is needed, not {type(encoder).__name__}")
    return encoder


def resolve_ladder(encoder: TwoDMSEModel, args: TwoDMSETrainingArguments) -> list[Size]:
    """The ladder of the arguments, else the model's own; checked against the model."""
    sizes = args.sizes if args.sizes is not None else encoder.config.sizes
    if sizes is None:
        raise ValueError("sizes: no ladder is set; name the sizes to train, for example 2x64 4x128 6x384")
    ladder = parse_ladder(sizes, encoder.num_layers, encoder.config.hidden_size)
    args.sizes = [str(size) for size in ladder]
    if args.objective == "espresso" and args.compression_dim > encoder.config.hidden_size:
        raise ValueError(
            f"compression_dim: {args.compression_dim} is not allowed; the backbone has 1 to "
            f"{encoder.config.hidden_size} dimensions"
        )
    return ladder


def resolve_loss(loss: str | None, table: Dataset, ladder: Sequence[Size], objective: str) -> str:
    """The base loss, chosen from the columns when none is named; ValueError where it does not fit them."""
    scored = "score" in table.column_names
    fitting = tuple(SCORE_LOSSES) if scored else PAIR_LOSSES
    loss = loss or ("cosent" if scored else "infonce")
    if loss not in fitting:
        raise ValueError(
            f"loss: {loss} does not fit the columns ({', '.join(table.column_names)}); use {' or '.join(fitting)}"
        )
    odd = [str(size) for size in ladder if size.dim % 2]
    if loss == "angle" and odd:
        raise ValueError(f"sizes: {', '.join(odd)} has an odd dim, which the angle loss cannot split in two halves")
    return loss
