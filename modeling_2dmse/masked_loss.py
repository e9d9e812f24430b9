"""Cross-entropy over a vocabulary for many rows, without all rows' logits in memory at once."""

import torch

# Most logits in one chunk (134 MB in float32): large enough for matrix products at full speed.
_CHUNK_LOGITS = 2**25


def vocabulary_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_i row_weights_i * cross_entropy(states_i weight^T + bias, targets_i), with its gradients, chunk by chunk.

    The gradients are computed in the forward pass, while a chunk's logits are in memory. Only the three matrix
    products of a linear layer are computed, and no logits are kept for the backward pass.

    Args:
        states: (rows, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        targets: (rows,) token ids.
        row_weights: (rows,) factors, which get no gradient.

    Returns:
        The sum, a float32 scalar; each row's cross-entropy, (rows,); whether each row's most likely token is the
        target, (rows,). The last two are without gradient.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _VocabularyLoss.apply(states, weight, bias, targets, row_weights, torch.is_grad_enabled())


class _VocabularyLoss(torch.autograd.Function):
    """`vocabulary_loss` under one dtype; `with_grad` says whether gradients are enabled outside."""

    @staticmethod
    def forward(ctx, states, weight, bias, targets, row_weights, with_grad):
        needs_states, needs_weight, needs_bias = (with_grad and needed for needed in ctx.needs_input_grad[:3])
        exact = torch.promote_types(states.dtype, torch.float32)
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if needs_bias else None
        losses = states.new_empty(len(states), dtype=exact)
        hits = torch.empty(len(states), dtype=torch.bool, device=states.device)
        step = max(1, _CHUNK_LOGITS // len(weight))
        for start in range(0, len(states), step):
            rows = slice(start, start + step)
            part, target = states[rows], targets[rows].unsqueeze(1)
            logits = (part @ weight.T).to(exact)
            if bias is not None:
                logits += bias
            highest, likeliest = logits.max(dim=1, keepdim=True)
            hits[rows] = (likeliest == target).squeeze(1)
            target_logits = logits.gather(1, target) - highest
            total = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
            losses[rows] = (total.log() - target_logits).squeeze(1)
            if grad_states is None and grad_weight is None and grad_bias is None:
                continue
            # d loss / d logits = softmax - one-hot; the softmax's numerator is already computed.
            factor = row_weights[rows].unsqueeze(1).to(exact)
            grad = logits.mul_(factor / total).scatter_add_(1, target, -factor)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(states.dtype)
            if grad_states is not None:
                torch.mm(grad, weight, out=grad_states[rows])
            if grad_weight is not None:
                _accumulate(grad_weight, grad, part)
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses, hits)
        return (losses * row_weights).sum(), losses, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        states, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if states is None else states * grad_loss.to(states.dtype),
            None if weight is None else (weight * grad_loss).to(weight_dtype),
            None if bias is None else (bias * grad_loss).to(bias_dtype),
            None,
            None,
            None,
        )


def _accumulate(total: torch.Tensor, grad: torch.Tensor, states: torch.Tensor) -> None:
    """total += grad^T states; products in half precision are summed in float32."""
    if total.dtype == states.dtype:
        total.addmm_(grad.T, states)
    else:
        total += grad.T @ states
