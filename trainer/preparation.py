"""The steps that prepare a `TwoDMSETrainer`: model, sizes, rows, base loss, objective and order of the rows."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_2dmse import Size, TwoDMSEModel, parse_ladder
from modeling_2dmse.batching import check_words
from modeling_2dmse.configuration_2dmse import default_ladder
from modeling_2dmse.packing import is_compiled

from .arguments import TwoDMSETrainingArguments
from .choices import PAIR_LOSSES, TEACHER_LOSSES
from .data import (
    TEACHER_SCORE,
    UNLABELED,
    PairCollator,
    add_unlabeled_texts,
    check_table,
    join_tables,
    query_document_prompts,
    rescale_scores,
    text_columns,
)
from .guide import GuidedCollator, guide_collator
from .losses import SCORE_LOSSES
from .objectives import Objective
from .shared.mixin import check_at_hand
from .shared.sampling import BlockSampler
from .shared.tables import require_table
from .teacher_embeddings import TargetCollator, TeacherEmbeddings

logger = logging.get_logger(__name__)


def find_encoder(model: PreTrainedModel) -> TwoDMSEModel:
    """The `TwoDMSEModel` itself, or the one inside a peft model; ValueError for another or an offloaded model."""
    encoder: Any = model
    if hasattr(encoder, "get_base_model"):
        encoder = encoder.get_base_model()
    if not isinstance(encoder, TwoDMSEModel) and type(encoder).__name__ == TwoDMSEModel.__name__:
        raise ValueError(
            "model: it was loaded with the code of its folder, before twodmse was imported; load it with "
            "twodmse.TwoDMSEModel.from_pretrained"
        )
    if not isinstance(encoder, TwoDMSEModel):
        raise ValueError(
            f"model: a TwoDMSEModel is needed, not {type(encoder).__name__}; make one with "
            "TwoDMSEModel.from_backbone(NAME_OR_FOLDER), or load one with TwoDMSEModel.from_pretrained"
        )
    check_at_hand(model)
    return encoder


def set_tokenizer(encoder: TwoDMSEModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give the encoder a tokenizer, its own if it is None, and set the ids of special tokens in its configuration, as
    Trainer does, which warns of it; ValueError if the tokenizer has a token without a word embedding."""
    encoder.tokenizer = tokenizer or encoder.tokenizer
    rows = getattr(encoder.get_input_embeddings(), "num_embeddings", None)
    check_words(max(encoder.tokenizer.get_vocab().values(), default=0), rows)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if (token := getattr(encoder.tokenizer, name, None)) is not None:
            setattr(encoder.config, name, token)


def check_arguments(args: object, others: Mapping[str, object]) -> None:
    """ValueError if the arguments are not those of this trainer, or for an argument of `Trainer` without an effect."""
    if not isinstance(args, TwoDMSETrainingArguments):
        raise ValueError(f"args: TwoDMSETrainingArguments are needed, not {type(args).__name__}")
    metrics = "evaluate scores embeddings; override it, or score the embeddings that predict returns"
    for name, reason in {
        **dict.fromkeys(("compute_metrics", "preprocess_logits_for_metrics"), metrics),
        "compute_loss_func": "the loss is that of the arguments; override compute_loss",
    }.items():
        if others.get(name) is not None:
            raise ValueError(f"{name}: it would not be called; {reason}")


def check_optimizers(encoder: TwoDMSEModel, optimizers: Any) -> None:
    """ValueError if an optimizer that the trainer is given would not train the exit projections."""
    optimizer = optimizers and optimizers[0]
    if optimizer and encoder.exit_projections is not None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not all(id(parameter) in trained for parameter in encoder.exit_projections.parameters()):
            raise ValueError(
                "optimizers: the optimizer lacks the exit projections; call fit_exit_projections(model, texts) before "
                "it is made"
            )


def resolve_ladder(encoder: TwoDMSEModel, args: TwoDMSETrainingArguments) -> list[Size]:
    """The ladder of the arguments, or else of the model, or else one that fits the model; ValueError if a size does not
    fit it."""
    sizes = args.sizes if args.sizes is not None else encoder.config.sizes
    if sizes is None:
        sizes = [str(size) for size in default_ladder(encoder.num_layers, encoder.config.dim)]
        logger.warning(f"sizes: none are set; a ladder that fits the model is trained: {' '.join(sizes)}")
    ladder = parse_ladder(sizes, encoder.num_layers, encoder.config.hidden_size)
    args.sizes = [str(size) for size in ladder]
    if args.objective == "espresso" and args.compression_dim > encoder.config.hidden_size:
        raise ValueError(
            f"compression_dim: {args.compression_dim} is not allowed; the backbone has 1 to "
            f"{encoder.config.hidden_size} dimensions"
        )
    return ladder


def set_comparison(encoder: TwoDMSEModel, args: TwoDMSETrainingArguments) -> None:
    """Set the similarity and the prompts of the arguments in the model's configuration, and thus in what is saved."""
    config = encoder.config
    if args.similarity is None and config.similarity != "cosine":
        raise ValueError(
            f"similarity: this model compares embeddings by {config.similarity}; pass {config.similarity} to keep it, "
            "or cosine"
        )
    config.similarity = args.similarity or "cosine"
    for name, prompt in (("query", args.query_prompt), ("document", args.document_prompt)):
        if prompt is not None:
            config.prompts = config.prompts | {name: prompt}


def check_training_tables(
    train_dataset: Dataset | Sequence[Dataset] | Mapping[str, Dataset] | None,
) -> list[Dataset]:
    """The checked tables of a training dataset, which may be one table, several in a list or a dict, or none."""
    if train_dataset is None:
        return []
    tables: Sequence[Any] = [train_dataset]
    if isinstance(train_dataset, Mapping) and not isinstance(train_dataset, DatasetDict):
        tables = list(train_dataset.values())
    elif isinstance(train_dataset, (list, tuple)):
        tables = train_dataset
    if not tables:
        raise ValueError("train_dataset: it is empty")
    return [check_table(require_table(table, "train_dataset"), "train_dataset") for table in tables]


def prepare_rows(
    tables: Sequence[Dataset],
    args: TwoDMSETrainingArguments,
    ladder: Sequence[Size],
    unlabeled_texts: Sequence[str] | None,
) -> Dataset:
    """The training rows of checked tables, with the texts without labels. Sets `args.loss` to the base loss."""
    rows = join_tables(tables)
    args.loss = resolve_loss(args.loss, rows, ladder)
    _check_roles(rows, args)
    if args.loss == "infonce":
        rows = rows.remove_columns([name for name in rows.column_names if name.endswith(TEACHER_SCORE)])
    if args.loss == "cosine_mse":
        rows, highest = rescale_scores(rows)
        logger.info(f"cosine_mse: scores were divided by {highest:g}")
    if unlabeled_texts is not None:
        rows = add_unlabeled_texts(rows, unlabeled_texts, args.seed, args.per_device_train_batch_size)
    return rows


def _check_roles(rows: Dataset, args: TwoDMSETrainingArguments) -> None:
    """ValueError for an argument that the columns or the similarity leave without a meaning."""
    for name in ("query_prompt", "document_prompt", "max_query_length"):
        if "anchor" not in rows.column_names and getattr(args, name) is not None:
            raise ValueError(
                f"{name}: the columns ({', '.join(rows.column_names)}) have no queries; use it with anchors"
            )
    if args.loss == "cosine_mse" and args.similarity == "dot":
        raise ValueError("loss: cosine_mse needs similarity cosine; use cosent for dot")


def resolve_loss(loss: str | None, table: Dataset, ladder: Sequence[Size]) -> str:
    """The base loss, by default the one for these columns; ValueError if it does not fit the columns or the sizes."""
    fitting: tuple[str, ...] = PAIR_LOSSES
    if "score" in table.column_names:
        fitting = tuple(SCORE_LOSSES)
    elif "negative_score" in table.column_names or "negative_1_score" in table.column_names:
        fitting = (*TEACHER_LOSSES, *PAIR_LOSSES)
    loss = loss or fitting[0]
    if loss not in fitting:
        raise ValueError(
            f"loss: {loss} does not fit the columns ({', '.join(table.column_names)}); use {' or '.join(fitting)}"
        )
    odd = [str(size) for size in ladder if size.dim % 2]
    if loss == "angle" and odd:
        raise ValueError(f"sizes: {', '.join(odd)} has an odd dim, which the angle loss cannot split into two halves")
    return loss


def make_objective(
    encoder: TwoDMSEModel, ladder: Sequence[Size], args: TwoDMSETrainingArguments, with_unlabeled: bool
) -> Objective:
    """The objective of the arguments; ValueError if it has no use for an argument that is set."""
    objective = Objective(
        name=args.objective,
        ladder=ladder,
        num_layers=encoder.num_layers,
        hidden_size=encoder.config.hidden_size,
        alignment=args.alignment,
        alignment_weight=args.alignment_weight,
        compression_dim=args.compression_dim,
        teacher=args.teacher,
        cross_size_weight=args.cross_size_weight,
        unlabeled_weight=args.unlabeled_weight if with_unlabeled else 0.0,
        similarity=encoder.config.similarity,
        embedding_weight=args.embedding_weight,
        shallow_steps=args.shallow_steps,
        feature_kl_form=args.feature_kl_form,
        draw_full_dim=args.draw_full_dim,
        separate_full_width=args.separate_full_width,
    )
    if args.shallow_steps:
        _check_shallow_steps(objective)
    for name in ("refine_projections", "exit_gates"):
        if getattr(args, name):
            _check_refining(name, encoder, ladder)
    if args.embedding_weight and encoder.config.similarity != "cosine":
        raise ValueError("embedding_weight: the distance is that of unit vectors; it needs similarity cosine")
    if args.cross_size_weight and not objective.plan(random.Random(0)).crosses:
        raise ValueError(f"cross_size_weight: {args.objective} trains no shallower size to cross with the deepest")
    if args.teacher != "largest" and objective.kind not in ("score_kl", "query_kl"):
        raise ValueError(
            f"teacher: {args.teacher} needs the alignment score_kl or query_kl, but the alignment is {objective.kind}"
        )
    if args.teacher == "start" and args.objective == "separate":
        raise ValueError(
            "teacher: start would be the cut model itself for separate; use embeddings, or largest for none"
        )
    if with_unlabeled and not objective.plan(random.Random(0)).unlabeled:
        raise ValueError(
            f"unlabeled_texts: {args.objective} learns nothing from them with the alignment {objective.kind} and "
            f"unlabeled_weight {args.unlabeled_weight:g}"
        )
    return objective


def _check_shallow_steps(objective: Objective) -> None:
    if objective.name != "starbucks" or objective.kind == "none" or objective.teacher == "largest":
        raise ValueError(
            "shallow_steps: they need the objective starbucks and the teacher start or embeddings; set "
            "--shallow_steps 0 for others"
        )
    if all(size.num_layers > objective.middle_layers for size in objective.ladder):
        raise ValueError(
            f"shallow_steps: no size has at most {objective.middle_layers} layers, two thirds of the model's; "
            "add one to --sizes, or set --shallow_steps 0"
        )


def _check_refining(name: str, encoder: TwoDMSEModel, ladder: Sequence[Size]) -> None:
    if encoder.exit_projections is None:
        raise ValueError(f"{name}: the model has no exit projections; add --exit_projections true")
    if len(ladder) == 1 and ladder[0].num_layers == encoder.num_layers:
        raise ValueError(f"{name}: {ladder[0]} alone is learned from and has nothing to learn; add a size to --sizes")


def check_teacher(args: TwoDMSETrainingArguments, teacher: TeacherEmbeddings | None, guide: object) -> None:
    """ValueError if the teacher of the arguments and what the trainer is given do not fit each other."""
    if (args.teacher == "embeddings") != (teacher is not None):
        raise ValueError("teacher: embeddings and the trainer's teacher_embeddings belong together; pass both or none")
    if teacher is not None and guide is not None:
        raise ValueError("guide: it cannot be used with teacher_embeddings")


# Texts of a table whose tokens are kept in memory from epoch to epoch; longer tables are tokenized again.
_KEPT_TEXTS = 2_000_000


def make_collator(
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    encoder: TwoDMSEModel,
    args: TwoDMSETrainingArguments,
    guide: TwoDMSEModel | None = None,
    teacher: TeacherEmbeddings | None = None,
) -> PairCollator | GuidedCollator | TargetCollator:
    """The collator of the training rows. On a GPU it packs them, if the model packs; on a CPU buckets are as fast."""
    columns = text_columns(rows)
    repeats = args.num_train_epochs > 1 or args.max_steps > len(rows) // args.train_batch_size
    remember = repeats and len(rows) * len(columns) <= _KEPT_TEXTS
    collator = PairCollator(
        tokenizer,
        columns,
        min(args.max_length, encoder.max_length),
        packed=runs_packed(encoder, args),
        remember=remember,
        prompts=query_document_prompts(columns, encoder.config.prompts),
        max_first_length=min(args.max_query_length or args.max_length, encoder.max_length),
    )
    if teacher is not None:
        return TargetCollator(collator, teacher)
    if guide is None:
        return collator
    return GuidedCollator(collator, guide_collator(guide, [name for name in columns if name != UNLABELED], collator))


def runs_packed(encoder: TwoDMSEModel, args: TwoDMSETrainingArguments) -> bool:
    """Whether the rows of a step run as one packed row."""
    padded = args.torch_compile or is_compiled(encoder) or args.gradient_cache_chunk_size is not None
    return args.device.type == "cuda" and not padded and encoder.packs


def check_checkpointing(args: TwoDMSETrainingArguments) -> None:
    """ValueError for gradient checkpointing that DistributedDataParallel does not support."""
    options = args.gradient_checkpointing_kwargs
    reentrant = args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant")
    if reentrant and args.world_size > 1 and (args.num_buckets > 1 or args.ddp_find_unused_parameters):
        raise ValueError(
            "gradient_checkpointing_kwargs: use_reentrant does not go with several processes that run a layer more "
            "than once per step; leave it out, or set num_buckets to 1 and train without exit projections"
        )


def make_block_sampler(tables: Sequence[Dataset], args: TwoDMSETrainingArguments) -> BlockSampler | None:
    """The sampler of the training rows; None if `Trainer`'s own sampler is right."""
    world = args.world_size
    plain = args.batch_sampler == "random" and len(tables) == 1
    if not tables or (plain and (world == 1 or args.train_sampling_strategy == "sequential")):
        return None
    # With several processes, accelerate completes the last batches with rows from the start of the order.
    keep_last = not args.dataloader_drop_last and (world == 1 or args.batch_sampler != "no_duplicates")
    return BlockSampler(
        tables, args.train_batch_size * world, args.batch_sampler, args.mixing, args.seed, keep_last=keep_last
    )
