"""Large batches in little memory: the loss of all rows at once, the encoder in chunks (Gao et al. 2021, GradCache)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from modeling_2dmse.encoding import back_in_order, even_groups, row_lengths


class RandomState:
    """The random state of the CPU and of the devices at the moment it was taken."""

    def __init__(self, *tensors: torch.Tensor):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, random numbers come again as they came after this state; behind, as if nothing had happened."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


class CachedForward:
    """
    The encoder's forward over all rows of a batch, in chunks of rows of similar length, and its backward.

    `states` are computed without a graph; `backward` runs each chunk once more, with the random numbers of the first
    time, so that dropout drops the same, and goes backward from it.

    Args:
        forward: from a chunk's inputs to its (L, rows, H) states.
        inputs: tensors of (rows, length), among them `attention_mask`; padding on the right.
        chunk_rows: rows a chunk.
        lengths: of the rows, where they are known without asking the GPU.
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
        self.random_states = []

    @torch.no_grad()
    def states(self) -> torch.Tensor:
        """(L, rows, H), in the rows' order, without gradient."""
        states = []
        for chunk in self.chunks:
            self.random_states.append(RandomState(chunk["attention_mask"]))
            states.append(self.forward(chunk))
        return torch.cat(states, dim=1)[:, self.restore]

    def backward(self, gradient: torch.Tensor, run: Callable[[Callable[[], torch.Tensor], bool], None]) -> None:
        """
        Args:
            gradient: (L, rows, H), of the loss with respect to the states.
            run: called with a function that gives a chunk's scalar, and whether it is the last chunk; it goes backward.
        """
        last = len(self.chunks) - 1
        for index, (chunk, rows, state) in enumerate(zip(self.chunks, self.rows, self.random_states, strict=True)):

            def scalar(chunk=chunk, rows=rows, state=state) -> torch.Tensor:
                with state.restored():
                    # d scalar / d parameters = d loss / d states * d states / d parameters
                    return (self.forward(chunk).float() * gradient[:, rows]).sum()

            run(scalar, index == last)
