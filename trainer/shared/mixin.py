"""The base class of the mixins that go before `Trainer` in the bases of a trainer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixin
else:

    class TrainerMixin:
        """For a type checker, this is `Trainer`: a mixin uses its attributes and calls its methods with `super()`."""


def check_model(model: object) -> None:
    """ValueError if a trainer that cannot make its model by itself is given none."""
    if model is None:
        raise ValueError("model: None is not allowed; give a model, because this trainer does not support model_init")
