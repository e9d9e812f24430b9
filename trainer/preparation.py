"""The steps that prepare a `TwoDMSETrainer`: model, sizes, rows, base loss, objective and order of the rows."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_2dmse import Size, TwoDMSEModel, parse_ladder
from modeling_2dmse.configuration_2dmse import default_ladder

from .arguments import TwoDMSETrainingArguments
from .data import PairCollator, add_unlabeled_texts, check_table, join_tables, rescale_scores, text_columns
from .losses import PAIR_LOSSES, SCORE_LOSSES
from .objectives import Objective
from .shared.sampling import BlockSampler

logger = logging.get_logger(__name__)


def find_encoder(model: PreTrainedModel) -> TwoDMSEModel:
    """The `TwoDMSEModel` itself, or the one inside a peft model; ValueError for any other model."""
    encoder: Any = model
    if hasattr(encoder, "get_base_model"):
        encoder = encoder.get_base_model()
    if not isinstance(encoder, TwoDMSEModel) and type(encoder).__name__ == TwoDMSEModel.__name__:
        raise ValueError(
            "model: it was loaded with the code of its folder, before twodmse was imported; load it with "
            "twodmse.TwoDMSEModel.from_pretrained"
        )
    if not isinstance(encoder, TwoDMSEModel):
        raise ValueError(f"model: a TwoDMSEModel is needed, not {type(encoder).__name__}")
    return encoder


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


def check_training_tables(train_dataset: Dataset | Sequence[Dataset] | None) -> list[Dataset]:
    """The checked tables of a training dataset, which may be one table, several or none."""
    tables = [train_dataset] if isinstance(train_dataset, Dataset) else train_dataset or []
    return [check_table(table, "train_dataset") for table in tables]


def prepare_rows(
    tables: Sequence[Dataset],
    args: TwoDMSETrainingArguments,
    ladder: Sequence[Size],
    unlabeled_texts: Sequence[str] | None,
) -> Dataset:
    """The training rows of checked tables, with the texts without labels. Sets `args.loss` to the base loss."""
    rows = join_tables(tables)
    args.loss = resolve_loss(args.loss, rows, ladder)
    if args.loss == "cosine_mse":
        rows, highest = rescale_scores(rows)
        logger.info(f"cosine_mse: scores were divided by {highest:g}")
    if unlabeled_texts is not None:
        rows = add_unlabeled_texts(rows, unlabeled_texts, args.seed, args.per_device_train_batch_size)
    return rows


def resolve_loss(loss: str | None, table: Dataset, ladder: Sequence[Size]) -> str:
    """The base loss, by default the one for these columns; ValueError if it does not fit the columns or the sizes."""
    scored = "score" in table.column_names
    fitting = tuple(SCORE_LOSSES) if scored else PAIR_LOSSES
    loss = loss or ("cosent" if scored else "infonce")
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
    )
    if args.cross_size_weight and not objective.plan(random.Random(0)).crosses:
        raise ValueError(f"cross_size_weight: {args.objective} trains no shallower size to cross with the deepest")
    if args.teacher == "start" and objective.kind != "score_kl":
        raise ValueError(f"teacher: start needs the alignment score_kl, but the alignment is {objective.kind}")
    if with_unlabeled and not objective.plan(random.Random(0)).unlabeled:
        raise ValueError(
            f"unlabeled_texts: {args.objective} learns nothing from them with the alignment {objective.kind} and "
            f"unlabeled_weight {args.unlabeled_weight:g}"
        )
    return objective


# Texts of a table whose tokens are kept in memory from epoch to epoch; longer tables are tokenized again.
_KEPT_TEXTS = 2_000_000


def make_collator(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, encoder: TwoDMSEModel, args: TwoDMSETrainingArguments
) -> PairCollator:
    """The collator of the training rows. On a GPU it packs them, if the model packs; on a CPU buckets are as fast."""
    columns = text_columns(rows)
    repeats = args.num_train_epochs > 1 or args.max_steps > len(rows) // args.train_batch_size
    remember = repeats and len(rows) * len(columns) <= _KEPT_TEXTS
    length = min(args.max_length, encoder.max_length)
    return PairCollator(tokenizer, columns, length, packed=runs_packed(encoder, args), remember=remember)


def runs_packed(encoder: TwoDMSEModel, args: TwoDMSETrainingArguments) -> bool:
    """Whether the rows of a step run as one packed row."""
    padded = args.torch_compile or args.gradient_cache_chunk_size is not None
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
