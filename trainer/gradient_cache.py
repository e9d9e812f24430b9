"""Large batches in little memory: the encoder runs in chunks, the loss sees all rows (GradCache, Gao et al. 2021)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from modeling_2dmse.batching import back_in_order, even_groups, row_lengths


class RandomState:
    """The random state of the CPU and of the devices of some tensors, at the time of its creation."""

    def __init__(self, *tensors: torch.Tensor):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context that starts from this random state, and restores the state from before when it ends."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


class CachedForward:
    """The forward and backward pass of the encoder over all rows of a batch, in chunks of rows of similar length.

    `states` runs without a graph. `backward` runs each chunk a second time with the same random numbers, so that
    dropout drops the same values, and then its backward pass.

    Args:
        forward: maps the inputs of a chunk to its (L, rows, H) states.
        inputs: tensors (rows, length), including `attention_mask`; padding is on the right.
        chunk_rows: rows per chunk.
        lengths: tokens of each row, if they are known without asking the GPU.
    """

    def __init__(
        self,
        forward: Callable[[dict], torch.Tensor],
        inputs: dict[str, torch.Tensor],
        chunk_rows: int,
        lengths: Sequence[int] | None = None,
    ):
        self.forward = forward
        mask = inputs["attention_mask"]
        groups = even_groups(row_lengths(mask) if lengths is None else lengths, chunk_rows)
        self.restore = back_in_order(groups).to(mask.device, non_blocking=True)
        self.rows = [torch.from_numpy(rows).to(mask.device, non_blocking=True) for rows, _ in groups]
        widths = [width for _, width in groups]
        self.chunks = [
            {name: value[rows, :width] for name, value in inputs.items()}
            for rows, width in zip(self.rows, widths, strict=True)
        ]
        self.random_states: list[RandomState] = []

    @torch.no_grad()
    def states(self) -> torch.Tensor:
        """(L, rows, H), in the order of the rows, without gradient."""
        states = []
        for chunk in self.chunks:
            self.random_states.append(RandomState(chunk["attention_mask"]))
            states.append(self.forward(chunk))
        return torch.cat(states, dim=1)[:, self.restore]

    def backward(self, gradient: torch.Tensor, run: Callable[[Callable[[], torch.Tensor], bool], None]) -> None:
        """Add the gradients of the parameters.

        Args:
            gradient: (L, rows, H), the gradient of the loss with respect to the states.
            run: runs the backward pass of a chunk; its arguments are a function that computes the chunk's scalar, and
                whether this is the last chunk.
        """
        last = len(self.chunks) - 1
        for index, (chunk, rows, state) in enumerate(zip(self.chunks, self.rows, self.random_states, strict=True)):

            def scalar(chunk=chunk, rows=rows, state=state) -> torch.Tensor:
                with state.restored():
                    # d scalar / d parameters = d loss / d states * d states / d parameters
                    return (self.forward(chunk).float() * gradient[:, rows]).sum()

            run(scalar, index == last)
