"""The rows of all processes as one batch, with gradients."""

import torch
import torch.distributed as dist

from .losses import Rows


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(states: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, Rows]:
    """
    Join the batches of all processes: every process then computes the loss of one large batch.

    Args:
        states: (L, C * B, H) pooled states of this process, column after column; B may differ between processes.
        rows: the roles of these rows.

    Returns:
        (L, C * sum of B, H), column after column, within each the processes in order; and the roles. Gradients reach
        this process's own rows alone, times the number of processes: DDP, FSDP and DeepSpeed take the mean over
        processes, and the sum of what each contributes is wanted.
    """
    count = world_size()
    if count == 1:
        return states, rows
    columns = states.unflatten(1, (rows.num_columns, -1))
    sizes = _gather(torch.tensor([columns.shape[2]], device=states.device))
    sizes = torch.cat(sizes).tolist()
    parts = _gather_uneven(columns.detach().transpose(0, 2), sizes)
    own = columns.view_as(columns)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * count)
    parts = [part.transpose(0, 2) for part in parts]
    parts[dist.get_rank()] = own
    scores = None if rows.scores is None else torch.cat(_gather_uneven(rows.scores, sizes))
    return torch.cat(parts, dim=2).flatten(1, 2), Rows(rows.num_columns, scores)


def _gather_uneven(rows: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Every process's (size, ...); they travel padded to the largest."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return [part[:size] for part, size in zip(_gather(padded), sizes, strict=True)]


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
