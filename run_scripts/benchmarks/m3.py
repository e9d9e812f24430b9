"""The cost of visual tokens: the time that the language model takes to read a prompt at each level."""

from functools import partial

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from modeling_m3 import MatryoshkaLlavaConfig, MatryoshkaLlavaForConditionalGeneration, visual_output
from run_scripts.shared.measure import in_turn, row, seconds

IMAGE_TOKEN = 4
# The 24 x 24 grid of LLaVA-1.5, and a language model small enough for a CPU; one image and 30 words of text.
SIDE, HIDDEN, LAYERS, VOCABULARY, WORDS = 24, 512, 8, 2000, 30


def m3_cost(runs: int) -> list[dict]:
    """The time at each level over that with all visual tokens, and the same ratio for operations and cache bytes."""
    model = make_model()
    states = torch.randn(1, SIDE**2, HIDDEN, device=model.device)
    sizes = model.config.visual_token_sizes
    prompts = {size: partial(read_prompt, model, states, size) for size in sizes}
    for size in sizes:
        prompts[size]()  # the first call allocates memory and starts threads
    taken = in_turn(runs, {str(size): partial(seconds, prompts[size]) for size in sizes})
    full, rows = model.prefill_cost(WORDS, sizes[-1]), []
    for size in sizes[:-1]:
        cost = model.prefill_cost(WORDS, size)
        more = {"flops_ratio": cost.flops / full.flops, "kv_cache_ratio": cost.kv_cache_bytes / full.kv_cache_bytes}
        rows.append(row(f"m3.prefill.{size}", "< 1", taken[str(size)], taken[str(sizes[-1])], **more))
    return rows


def make_model() -> MatryoshkaLlavaForConditionalGeneration:
    """A LLaVA with random weights, on the GPU if there is one."""
    shape = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_attention_heads": 8}
    config = MatryoshkaLlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_hidden_layers=1, image_size=14 * SIDE, patch_size=14),
        text_config=LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=VOCABULARY),
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MatryoshkaLlavaForConditionalGeneration(config).eval().to(device)


@torch.no_grad()
def read_prompt(model: MatryoshkaLlavaForConditionalGeneration, states: torch.Tensor, size: int) -> torch.Tensor:
    """The logits of the first answer token.

    Args:
        states: (1, SIDE**2, HIDDEN), the image after the vision tower, whose work is the same at every level.
        size: number of visual tokens.
    """
    words = torch.arange(WORDS) + IMAGE_TOKEN + 1
    ids = torch.cat([torch.full((size,), IMAGE_TOKEN), words]).unsqueeze(0).to(states.device)
    features = {"image": visual_output(model.pool_images(states, size))}
    return model(input_ids=ids, mm_encoder_outputs=features, logits_to_keep=1, use_cache=True).logits
