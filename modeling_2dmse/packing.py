"""Texts as ONE row of real tokens: no layer runs on padding, and attention stays within each text.

The attention function below is registered with transformers' `AttentionInterface`. A backbone that is set to it attends
within texts when it is given a `Packing`, and runs transformers' own scaled dot-product attention otherwise. No forward
is replaced: models pass keyword arguments through to their attention function.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .backbone import first_position
from .running import inference_twin

varlen_attn: Callable | None
try:
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

ATTENTION = "twodmse_packed"
# A GPU plans each new shape of padded attention once. Multiples of this width keep the shapes few.
_WIDTH = 32


class Packing:
    """Where each text is in a row of tokens.

    Args:
        lengths: tokens of each text, in the order of the row.
        device: of the tokens. What attention needs is copied there once, on first use.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.device = torch.device(device)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    @cached_property
    def cu_seq_lens(self) -> torch.Tensor:
        """(texts + 1,), int32: the first token of each text, and the number of all tokens."""
        return to_device(self._starts.astype(np.int32), self.device)

    @cached_property
    def text_lengths(self) -> torch.Tensor:
        """(texts,), int64: tokens of each text."""
        return to_device(self.lengths, self.device)

    @cached_property
    def text_ids(self) -> torch.Tensor:
        """(tokens,), int64: the text of each token."""
        return to_device(np.repeat(np.arange(len(self.lengths)), self.lengths), self.device)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """(1, tokens): the position of each token in its text, from 0."""
        positions = np.arange(self._starts[-1]) - np.repeat(self._starts[:-1], self.lengths)
        return to_device(positions[None], self.device)

    @cached_property
    def equal_lengths(self) -> list[tuple[int, int, int]]:
        """(first token, texts, tokens of each) for every run of neighboring texts of one length."""
        cuts = [0, *(np.flatnonzero(np.diff(self.lengths)) + 1).tolist(), len(self.lengths)]
        return [
            (int(self._starts[first]), end - first, int(self.lengths[first])) for first, end in itertools.pairwise(cuts)
        ]

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The row as a padded batch: (texts, width), the token in each place; (tokens,), the place of each token;
        (texts, 1, 1, width), which places hold a token."""
        width = -(-self.longest // _WIDTH) * _WIDTH
        real = np.arange(width)[None] < self.lengths[:, None]
        tokens = np.where(real, self._starts[:-1, None] + np.arange(width)[None], 0)
        places = np.flatnonzero(real)
        first, second, third = (to_device(array, self.device) for array in (tokens, places, real[:, None, None]))
        return first, second, third


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on the device; the copy to a GPU starts from pinned memory and is not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention within each text of a packed row; scaled dot-product attention without a `packing`.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim).
        key: as `query`, with all heads or one per group.
        value: as `key`.
        attention_mask: of a padded batch; a packed row needs none.
        packing: where each text is.
        kwargs: `dropout`, `scaling`, `sliding_window` and what else the layer passes.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    causal, window = bool(getattr(module, "is_causal", False)), kwargs.get("sliding_window")
    dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    grouped = query.shape[1] != key.shape[1]
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    halves = query.dtype in (torch.float16, torch.bfloat16)
    if varlen_attn is not None and query.is_cuda and halves and not dropout:
        near = -1 if window is None else window - 1
        ends, longest = packing.cu_seq_lens, packing.longest
        reach = (near, 0 if causal else near)
        output = varlen_attn(
            query, key, value, ends, ends, longest, longest, scale=scale, window_size=reach, enable_gqa=grouped
        )
        return output[None], None
    options = {"dropout_p": dropout, "scale": scale, "enable_gqa": grouped}
    attend = _attend_by_length if query.device.type == "cpu" else _attend_padded
    return attend(packing, query, key, value, causal, window, options)[None], None


def _attend_by_length(packing, query, key, value, causal, window, options) -> torch.Tensor:
    """Texts of one length at a time, without padding or mask."""
    parts = []
    for first, texts, length in packing.equal_lengths:
        q, k, v = (
            states[first : first + texts * length].unflatten(0, (texts, length)).transpose(1, 2)
            for states in (query, key, value)
        )
        band = None if window is None or window >= length else _band(length, causal, window, query.device)
        output = scaled_dot_product_attention(q, k, v, band, is_causal=causal and band is None, **options)
        parts.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _attend_padded(packing, query, key, value, causal, window, options) -> torch.Tensor:
    """All texts at once, padded to one width for the attention only."""
    tokens, places, mask = packing.padded
    width = tokens.shape[1]
    q, k, v = (states[tokens].transpose(1, 2) for states in (query, key, value))
    if causal or (window is not None and window < width):
        mask = mask & _band(width, causal, width if window is None else window, query.device)
    output = scaled_dot_product_attention(q, k, v, mask, **options)
    return output.transpose(1, 2).flatten(0, 1)[places]


def _band(length: int, causal: bool, window: int, device: torch.device) -> torch.Tensor:
    """(length, length), which keys each query sees: those less than `window` tokens away, and none ahead if causal."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None]
    near = distance.abs() < window
    return near & (distance >= 0) if causal else near


def pool_packed(state: torch.Tensor, packing: Packing, mode: str, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Pool the token states of a packed row, as `pooling.pool` does those of a padded batch.

    Args:
        state: (tokens, hidden), any float type.
        packing: where each text is.
        mode: `mean`, `cls`, `lasttoken` or `weightedmean`.
        weights: (tokens,), what `mean` and `weightedmean` multiply each state by.

    Returns:
        (texts, hidden) in float32.
    """
    ends = packing.cu_seq_lens
    if mode in ("cls", "lasttoken"):
        return state.index_select(0, ends[:-1] if mode == "cls" else ends[1:] - 1).float()
    with torch.autocast(device_type=state.device.type, enabled=False):
        counts = _counts(packing) if mode == "weightedmean" else None
        factors = counts if weights is None else weights if counts is None else counts * weights
        rows = state.float() if factors is None else state.float() * factors[:, None]
        return _sum_of_texts(rows, packing) / _totals(packing, mode)[:, None]


def packed_weights(logits: torch.Tensor, packing: Packing, mode: str) -> torch.Tensor:
    """(tokens,), float32: what `pooling.token_weights` gives, for the logits of a packed row, (tokens,)."""
    with torch.autocast(device_type=logits.device.type, enabled=False):
        lengths, texts = packing.text_lengths, packing.text_ids
        highest = torch.segment_reduce(logits.detach(), "max", lengths=lengths, axis=0, unsafe=True)
        weights = (logits - highest[texts]).exp()
        total = _sum_of_texts(weights * _counts(packing) if mode == "weightedmean" else weights, packing)
        return weights * (_totals(packing, mode) / total)[texts]


def _counts(packing: Packing) -> torch.Tensor:
    """(tokens,): the place of each token in its text, from 1."""
    return packing.position_ids[0].float() + 1


def _totals(packing: Packing, mode: str) -> torch.Tensor:
    """(texts,): the sum of what the tokens of each text count."""
    lengths = packing.text_lengths.float()
    return lengths * (lengths + 1) / 2 if mode == "weightedmean" else lengths


def _sum_of_texts(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    return torch.segment_reduce(rows, "sum", lengths=packing.text_lengths, axis=0, unsafe=True)


@torch.no_grad()
def find_packing(backbone: PreTrainedModel) -> bool:
    """Whether the backbone gives a packed row the states of a padded batch, found by trying. If so, its attention is
    set to `packed_attention`, which treats padded batches as before.

    Families whose attention does not go through transformers' `AttentionInterface`, or whose layers see positions
    across the row (relative biases), do not pack. Nor do backbones with another attention than `sdpa`.
    """
    names = inspect.signature(backbone.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    # A model that was cut out of one that packs has its attention already.
    usual = getattr(backbone.config, "_attn_implementation", None) in ("sdpa", ATTENTION)
    interface = getattr(backbone, "_supports_attention_backend", False)
    if not (usual and open_ended and interface and "position_ids" in names):
        return False
    # The texts are made up: whoever watches the layers need not see them.
    device, model = next(backbone.parameters()).device, inference_twin(backbone, hooks=False)
    lengths = (3, 5, 5, 9)
    ids = np.arange(sum(lengths)) * 7 % max(2, backbone.config.vocab_size - 1) + 1
    packing = Packing(lengths, device)
    tokens, places, mask = packing.padded
    row = to_device(ids[None], device)
    backbone.set_attn_implementation(ATTENTION)
    try:
        mask = mask.flatten(1).long()
        expected = model(input_ids=row[0][tokens], attention_mask=mask).last_hidden_state.flatten(0, 1)[places]
        found = model(input_ids=row, **packed_inputs(model, packing)).last_hidden_state[0]
        error, spread = (found.float() - expected.float()).abs(), expected.float().std()
        exact = expected.dtype == torch.float32  # half precision rounds some values by much
        packs = bool(error.max() < 1e-3 * spread if exact else error.mean() < 0.05 * spread)
    except (IndexError, RuntimeError, TypeError, ValueError):
        packs = False
    if not packs:
        backbone.set_attn_implementation("sdpa")
    return packs


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs parts of a model. These would be compiled again for each row of other texts."""
    return any(
        part._compiled_call_impl is not None
        or hasattr(part, "_orig_mod")
        or hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable")  # only the forward was compiled
        for part in model.modules()
    )


def packed_inputs(backbone: nn.Module, packing: Packing) -> dict:
    """What a backbone's forward needs beside the tokens of a packed row."""
    # A mask of four dimensions is taken as prepared: no family builds a mask of all tokens by all tokens.
    mask = torch.ones(1, 1, 1, 1, device=packing.device)
    return {"attention_mask": mask, "position_ids": packing.position_ids + first_position(backbone), "packing": packing}


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
