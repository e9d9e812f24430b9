"""The base class of the mixins that go before `Trainer` in the bases of a trainer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixin
else:

    class TrainerMixin:
        """For a type checker, this is `Trainer`: a mixin uses its attributes and calls its methods with `super()`."""
