"""What a prompt costs the language model: tokens, memory of keys and values, and operations."""

from typing import NamedTuple

from transformers import PreTrainedConfig

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class PrefillCost(NamedTuple):
    """Costs of one prompt.

    Attributes:
        sequence_length: tokens.
        kv_cache_bytes: bytes of the key-value cache.
        flops: floating-point operations up to the first answer token; a multiplication and an addition are two.
    """

    sequence_length: int
    kv_cache_bytes: int
    flops: int


def sequence_length(num_text_tokens: int, num_images: int, num_visual_tokens: int) -> int:
    """Tokens of a prompt; `num_text_tokens` does not include the image placeholders.

    >>> sequence_length(30, num_images=1, num_visual_tokens=576)
    606
    """
    return num_text_tokens + num_images * num_visual_tokens


def kv_cache_bytes(text_config: PreTrainedConfig, length: int, bytes_per_value: int) -> int:
    """Bytes of keys and values of `length` tokens: 2 * layers * key-value heads * head dimension * length * bytes."""
    _, _, _, kv_width = _shape(text_config)
    return 2 * text_config.num_hidden_layers * kv_width * length * bytes_per_value


def prefill_flops(text_config: PreTrainedConfig, length: int) -> int:
    """Floating-point operations to read `length` tokens and to score the first answer token.

    The decoder has gated feed-forward layers (Llama, Vicuna, Mistral, Qwen2). Per layer, with H hidden, Q query, K
    key-value and I intermediate dimensions and S tokens: 2S(HQ + 2HK + QH) for the projections, 4SSQ for the scores of
    all pairs and the weighted values, 6SHI for the feed-forward layer; then 2HV for one row of logits over V tokens.
    Norms, activations and rotations are not counted: they are linear in S and small.
    """
    hidden, inner, query, kv = _shape(text_config)
    projections = 2 * length * hidden * (query + 2 * kv) + 2 * length * query * hidden
    attention = 4 * length**2 * query
    feed_forward = 6 * length * hidden * inner
    return (
        text_config.num_hidden_layers * (projections + attention + feed_forward) + 2 * hidden * text_config.vocab_size
    )


def prefill_cost(
    text_config: PreTrainedConfig,
    num_text_tokens: int,
    num_visual_tokens: int,
    num_images: int = 1,
    bytes_per_value: int = 2,
) -> PrefillCost:
    """The costs of a prompt with images, not counting the vision tower, which costs the same at every level.

    Args:
        text_config: configuration of the language model.
        num_text_tokens: tokens of the prompt without image placeholders.
        num_visual_tokens: tokens per image.
        num_images: images of the prompt.
        bytes_per_value: of the key-value cache, 2 in half precision.

    Raises:
        ValueError: the kind of decoder is unknown.
    """
    length = sequence_length(num_text_tokens, num_images, num_visual_tokens)
    return PrefillCost(length, kv_cache_bytes(text_config, length, bytes_per_value), prefill_flops(text_config, length))


def _shape(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Hidden and intermediate size, and the widths of queries and of keys."""
    missing = [name for name in _NEEDED if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            f"text_config: {type(config).__name__} has no {' and no '.join(missing)}; costs are known for decoders "
            "with gated feed-forward layers, such as Llama, Mistral and Qwen2"
        )
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.hidden_size, config.intermediate_size, heads * head, kv_heads * head
