"""How attention and its masks are computed in a training."""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .mixin import TrainerMixin

UNREAD = "sdpa_unread_mask"
_nothing_padded = contextvars.ContextVar("nothing_padded", default=False)


def unread_mask(*args, **kwargs) -> torch.Tensor | None:
    """transformers' mask for scaled dot-product attention, without a look at the values of the `attention_mask`.

    transformers looks whether they are all 1, to leave the mask out. On a GPU, each forward pass would wait there until
    the step before is computed. Inside `nothing_padded`, all are taken to be 1.
    """
    if _nothing_padded.get():
        kwargs["attention_mask"] = None
    elif kwargs.get("attention_mask") is not None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(UNREAD, sdpa_attention_forward)
AttentionMaskInterface.register(UNREAD, unread_mask)


@contextlib.contextmanager
def nothing_padded() -> Iterator[None]:
    """Inside, `unread_mask` knows that the rows of a batch have no padding, and leaves masks out where it can."""
    token = _nothing_padded.set(True)
    try:
        yield
    finally:
        _nothing_padded.reset(token)


def leaves_masks_unread(device: torch.device) -> bool:
    """Whether waiting for the values of a mask costs more than it can save."""
    return device.type == "cuda"


@contextlib.contextmanager
def unread_masks(model: nn.Module) -> Iterator[None]:
    """Inside, the backbones of a model whose attention is `sdpa` make their masks with `unread_mask`."""
    found = [part for part in _backbones(model) if part.config._attn_implementation == "sdpa"]
    try:
        for part in found:
            part.set_attn_implementation(UNREAD)
        yield
    finally:
        for part in found:
            part.set_attn_implementation("sdpa")


def _backbones(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers inside a model that have no others inside, and whose attention can be chosen."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inner = [[one for one in part.modules() if isinstance(one, PreTrainedModel)] for part in parts]
    return [
        part
        for part, others in zip(parts, inner, strict=True)
        if part._supports_attention_backend and all(one.config is part.config for one in others)
    ]


class UnreadMaskMixin(TrainerMixin):
    """Goes before `Trainer`: on a GPU, a step does not wait for the values of attention masks."""

    def train(self, *args, **kwargs):
        model = self.model if leaves_masks_unread(self.args.device) else None
        with contextlib.nullcontext() if model is None else unread_masks(model):
            return super().train(*args, **kwargs)


class AttentionMixin(TrainerMixin):
    """Goes before `Trainer`: on a CPU, training in bf16 uses the attention that is written as matrix products.

    The backward pass of torch's fused attention for CPUs (2.13) takes seven times as long in bfloat16 as these
    products, so that a step of MiniLM takes 1.7 times as long; in float32 the fused one is as fast. Results differ by
    rounding.
    """

    def train(self, *args, **kwargs):
        in_bf16 = self.args.device.type == "cpu" and self.args.bf16
        with sdpa_kernel(SDPBackend.MATH) if in_bf16 else contextlib.nullcontext():
            return super().train(*args, **kwargs)
