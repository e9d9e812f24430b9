"""The base class of the mixins that go before `Trainer` in the bases of a trainer."""

from typing import TYPE_CHECKING, TypeVar

from transformers import TrainingArguments

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixin
else:

    class TrainerMixin:
        """For a type checker, this is `Trainer`: a mixin uses its attributes and calls its methods with `super()`."""


_Model = TypeVar("_Model")
_Arguments = TypeVar("_Arguments", bound=TrainingArguments)


def check_model(model: _Model | None) -> _Model:
    """The model; ValueError if a trainer that cannot make it by itself is given none."""
    if model is None:
        raise ValueError("model: None is not allowed; give a model, because this trainer does not support model_init")
    return model


def given_or_default(args: _Arguments | None, kind: type[_Arguments]) -> _Arguments:
    """The arguments of a trainer; if there are none, new ones with the folder that `Trainer` then writes to."""
    return kind(output_dir="tmp_trainer") if args is None else args
