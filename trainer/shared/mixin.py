"""The base class of the mixins that go before `Trainer` in the bases of a trainer."""

from typing import TYPE_CHECKING, TypeVar

from torch import nn
from transformers import TrainingArguments
from transformers.integrations.fsdp import is_fsdp_enabled

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixin
else:

    class TrainerMixin:
        """For a type checker, this is `Trainer`: a mixin uses its attributes and calls its methods with `super()`."""


_Model = TypeVar("_Model", bound=nn.Module)
_Arguments = TypeVar("_Arguments", bound=TrainingArguments)


def check_model(model: _Model | None) -> _Model:
    """The model; ValueError if a trainer that cannot make its model by itself is given none, or an offloaded one."""
    if model is None:
        raise ValueError("model: None is not allowed; give a model, because this trainer does not support model_init")
    check_at_hand(model)
    return model


def check_at_hand(model: nn.Module) -> None:
    """ValueError if weights are offloaded, as accelerate does it: a step would change copies that are thrown away."""
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta and not is_fsdp_enabled():  # with FSDP, only the first process reads the weights
        raise ValueError(
            f"model: {len(on_meta)} of its weights are offloaded or without values (on the meta device), for example "
            f"{on_meta[0]}; to train it, load it without cpu_offload and without a device_map that offloads layers"
        )


def given_or_default(args: _Arguments | None, kind: type[_Arguments]) -> _Arguments:
    """The arguments of a trainer; if there are none, new ones with the folder that `Trainer` then writes to."""
    return kind(output_dir="tmp_trainer") if args is None else args
