"""The rows of all processes as one batch, with gradients; what FSDP takes apart."""

import torch
import torch.distributed as dist
from accelerate import Accelerator

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.backbone import layers_of

from .losses import Rows


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard_by_layers(accelerator: Accelerator, encoder: TwoDMSEModel) -> None:
    """Make each transformer layer a unit of FSDP, where its configuration names no classes.

    accelerate would take transformers' `_no_split_modules`. BERT's and others' name the module around the word
    embeddings too, which accelerate makes a unit of their own under FSDP2: they would be split twice.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        layers = layers_of(encoder.backbone, encoder.config.layer_stack)
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})


def gather_rows(states: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, Rows]:
    """
    Join the batches of all processes: every process then computes the loss of one large batch.

    Args:
        states: (L, rows, H) pooled states of this process, column after column.
        rows: the roles of these rows; the number of rows, not that of columns, may differ between processes.

    Returns:
        (L, rows of all processes, H), column after column, within each the processes in order; and the roles. Gradients
        reach this process's own rows alone, times the number of processes: DDP, FSDP and DeepSpeed take the mean over
        processes, and the sum of what each contributes is wanted.
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
    columns = zip(*(part.split(count, dim=1) for part, count in zip(parts, counts, strict=True)), strict=True)
    joined = torch.cat([part for column in columns for part in column], dim=1)
    scores = rows.scores
    if scores is not None:
        scores = torch.cat(_gather_uneven(scores, [count[0] for count in counts]))
    *columns, unlabeled = map(sum, zip(*counts, strict=True))
    return joined, Rows(tuple(columns), scores, unlabeled)


def _gather_uneven(rows: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Every process's (size, ...); they travel padded to the largest."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return [part[:size] for part, size in zip(_gather(padded), sizes, strict=True)]


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
