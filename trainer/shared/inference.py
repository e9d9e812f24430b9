"""Evaluations during a training."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model that only its trainer uses into evaluation mode, and back into the mode that it had.

    `encode` would run copies of its modules instead, which wrappers like FSDP do not know.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
