"""Joining the rows of all processes into one batch, with gradients, and the units that FSDP shards."""

import torch
import torch.distributed as dist
from accelerate import Accelerator

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.backbone import layers_of

from .losses import Rows


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard_by_layers(accelerator: Accelerator, encoder: TwoDMSEModel) -> None:
    """Make each transformer layer a unit of FSDP, unless FSDP's configuration names classes.

    accelerate would use transformers' `_no_split_modules`. Those of BERT and others also name the module around the
    word embeddings. Under FSDP2, accelerate makes the word embeddings their own unit, so they would be sharded twice.

    Args:
        accelerator: the accelerator, before it prepares the model.
        encoder: the model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        layers = layers_of(encoder.backbone, encoder.config.layer_stack)
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})


def gather_rows(states: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, Rows]:
    """Join the batches of all processes, so that every process computes the loss of one large batch.

    Gradients reach only the rows of this process, multiplied by the number of processes: DDP, FSDP and DeepSpeed
    average gradients over processes, but here the sum of their contributions is needed.

    Args:
        states: (L, rows, H), the pooled states of this process, column after column.
        rows: the roles of these rows. Processes may have different numbers of rows, but not of columns.

    Returns:
        (L, rows of all processes, H), column after column, with the processes in order within each column; and the
        roles of these rows.
    """
    world = world_size()
    if world == 1:
        return states, rows
    counts = torch.stack(_gather(torch.tensor((*rows.counts, rows.unlabeled), device=states.device))).tolist()
    parts = _gather_uneven(states.detach().transpose(0, 1), [sum(count) for count in counts])
    own = states.view_as(states)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world)
    parts = [part.transpose(0, 1) for part in parts]
    parts[dist.get_rank()] = own
    by_column = zip(*(part.split(count, dim=1) for part, count in zip(parts, counts, strict=True)), strict=True)
    joined = torch.cat([part for column in by_column for part in column], dim=1)
    scores = rows.scores
    if scores is not None:
        scores = torch.cat(_gather_uneven(scores, [count[0] for count in counts]))
    *columns, unlabeled = map(sum, zip(*counts, strict=True))
    texts = [count[:-1] for count in counts]
    more: dict = {"guide": _gather_columns(rows.guide, texts)}
    if rows.owners is not None and rows.teacher_scores is not None:
        candidates = [count[1:] for count in texts]
        earlier = sum(count[0] for count in texts[: dist.get_rank()])  # anchors of the processes before this one
        more["owners"] = _gather_columns(rows.owners + earlier, candidates)
        more["teacher_scores"] = _gather_columns(rows.teacher_scores, candidates)
    return joined, Rows(tuple(columns), scores, unlabeled, **more)


def _gather_columns(rows: torch.Tensor | None, counts: list[list[int]]) -> torch.Tensor | None:
    """The (rows, ...) of every process, column after column; `counts` has the rows of each column of each process."""
    if rows is None:
        return None
    parts = _gather_uneven(rows, [sum(count) for count in counts])
    by_column = zip(*(part.split(count) for part, count in zip(parts, counts, strict=True)), strict=True)
    return torch.cat([part for column in by_column for part in column])


def _gather_uneven(rows: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The (size, ...) of every process; they are sent with padding to the largest size."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return [part[:size] for part, size in zip(_gather(padded), sizes, strict=True)]


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
