"""Counting the operations for which the host would wait for a GPU, on a machine that has none."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Their result, or its shape, depends on values that only the device has.
_READING = {
    aten._local_scalar_dense,  # item(), bool(), int(), float(), if
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.masked_scatter_backward,
}
# These read memory without an operator.
_METHODS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        waits = packet in _READING
        if packet in (aten.index, aten.index_put, aten.index_put_):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            fills = packet is not aten.index and args[2].numel() == 1  # torch turns it into masked_fill
            waits = bool(masks) and not fills
        if packet is aten.repeat_interleave:
            waits = kwargs.get("output_size") is None and isinstance(args[-1], torch.Tensor)
        if waits:
            self.found.append(f"{packet}: {_caller()}")
        return function(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _METHODS:
            self.found.append(f"{function.__name__}: {_caller()}")
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """A list that gets a line for each operation inside, backward passes included, for which a GPU would be waited
    for; the line names the operation and where it was called."""
    found: list[str] = []
    with _Methods(found), _Operators(found):
        yield found


def _caller() -> str:
    """File and line of the last callers outside torch."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames[-3:]))
