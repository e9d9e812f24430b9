"""Which implementation of scaled dot product attention a training uses."""

import contextlib

from torch.nn.attention import SDPBackend, sdpa_kernel

from .mixin import TrainerMixin


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
