"""Pooling of token states into one vector per text, in float32."""

import torch


def pool(
    state: torch.Tensor, attention_mask: torch.Tensor, mode: str, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Pool token states.

    Args:
        state: (batch, length, hidden), any float type.
        attention_mask: (batch, length), 1 for a real token, 0 for padding on either side.
        mode: `mean`, `cls` (first real token), `lasttoken` (last real token) or `weightedmean`
            (weight k for the k-th real token, SGPT's position-weighted mean).
        weights: (batch, length), what `mean` and `weightedmean` multiply each state by; see `token_weights`.

    Returns:
        (batch, hidden) in float32.

    Raises:
        ValueError: `mode` is unknown.
    """
    mask = attention_mask.to(torch.long)
    if mode == "cls":
        return _pick(state, mask.argmax(dim=1))
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        return _pick(state, last)
    if mode not in ("mean", "weightedmean"):
        raise ValueError(f"pooling: {mode!r} is unknown; choose one of mean, cls, lasttoken, weightedmean")
    counts = _counts(mask, mode)
    # Autocast would turn this product back into half precision.
    with torch.autocast(device_type=state.device.type, enabled=False):
        factors = counts if weights is None else counts * weights
        total = torch.bmm(factors.unsqueeze(1), state.float()).squeeze(1)
        return total / counts.sum(dim=1, keepdim=True).clamp(min=1.0)


def token_weights(logits: torch.Tensor, attention_mask: torch.Tensor, mode: str) -> torch.Tensor:
    """What to multiply the states of tokens by, so that their pooling weighs each token by exp(logit) too.

    Pooled by `mode`, the weights of each text are 1. What pools the multiplied states by `mode`, as other clients do,
    gets the weighted mean, sum(w_i exp(logit_i) state_i) / sum(w_i exp(logit_i)) with the weights w_i of `mode`.

    Args:
        logits: (batch, length), float32.
        attention_mask: (batch, length), 1 for a real token, 0 for padding on either side.
        mode: `mean` or `weightedmean`.

    Returns:
        (batch, length), float32; 0 for padding.
    """
    mask = attention_mask.to(torch.long)
    counts = _counts(mask, mode)
    logits = logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)
    weights = (logits - logits.detach().amax(dim=1, keepdim=True)).exp() * mask
    total = (counts * weights).sum(dim=1, keepdim=True)
    return weights * counts.sum(dim=1, keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny)


def _counts(mask: torch.Tensor, mode: str) -> torch.Tensor:
    """(batch, length), float32: what each token counts in the mean; 0 for padding."""
    return (mask if mode == "mean" else mask.cumsum(dim=1) * mask).to(torch.float32)


def _pick(state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return state[torch.arange(state.shape[0], device=state.device), index].float()


def cut_and_normalize(pooled: torch.Tensor, dim: int) -> torch.Tensor:
    """The embedding of a size: the first `dim` columns of (..., hidden), divided by their L2 norm.

    >>> cut_and_normalize(torch.tensor([[3.0, 4.0, 12.0]]), 2).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return torch.nn.functional.normalize(pooled[..., :dim].float(), dim=-1)
