"""Stock LLaVA at the full size, pooled tokens below it; generation; costs; wrong input."""

import copy

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaForConditionalGeneration, LlavaProcessor, OPTConfig, Qwen2Config

from modeling_m3 import (
    MatryoshkaLlavaForConditionalGeneration,
    MatryoshkaLlavaProcessor,
    pool_visual_tokens,
    prefill_cost,
    visual_output,
)
from modeling_m3.costs import kv_cache_bytes, prefill_flops, sequence_length
from run_scripts.digits_m3 import QUESTION

TEXTS = [f"user : <image> {QUESTION} assistant :", "user : <image> this assistant : two user : <image> is ?"]
POSITIONS = ("after_projector", "before_projector")


def pictures(count: int) -> list[Image.Image]:
    noise = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return [Image.fromarray(picture.numpy()) for picture in noise]


@pytest.fixture
def inputs(llava_processor):
    """A function from a number of visual tokens to a batch of two rows, with one and two images."""
    return lambda size=None: llava_processor(
        images=pictures(3), text=TEXTS, num_visual_tokens=size, padding=True, return_tensors="pt"
    )


def test_the_full_size_is_stock_llava(llava_path, tiny_m3, inputs):
    stock = LlavaForConditionalGeneration.from_pretrained(llava_path)
    expected = stock(**inputs()).logits
    assert expected.std() > 0.1
    for position in POSITIONS:
        model = tiny_m3(pool_position=position)
        assert set(model.state_dict()) == set(stock.state_dict())
        for given in ({}, {"num_visual_tokens": 36}):
            torch.testing.assert_close(model(**inputs(), **given).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("original", [False, True])
def test_a_stock_checkpoint_fills_every_tensor_and_is_saved_whole(original, llava_path, tmp_path):
    model, info = MatryoshkaLlavaForConditionalGeneration.from_pretrained(llava_path, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path, save_original_format=original)
    stock, ours = (set(safe_open(f"{folder}/model.safetensors", "pt").keys()) for folder in (llava_path, tmp_path))
    assert stock != set(model.state_dict()), "stock LLaVA is saved under older names, which must be translated"
    assert ours == (stock if original else set(model.state_dict()))
    again, info = MatryoshkaLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.model_type == model.config.model_type == "matryoshka_llava"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_smaller_sizes_read_pooled_features(position, size, llava_path, tiny_m3, inputs):
    """Against transformers' own tower, projector and language model, combined here."""
    stock, batch = LlavaForConditionalGeneration.from_pretrained(llava_path).model, inputs(size)
    states = stock.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    project = stock.multi_modal_projector
    tokens = (
        pool_visual_tokens(project(states), size)
        if position == "after_projector"
        else project(pool_visual_tokens(states, size))
    )
    embeddings = stock.language_model.embed_tokens(batch["input_ids"])
    embeddings[batch["input_ids"] == stock.config.image_token_id] = tokens.flatten(0, 1)
    expected = stock.language_model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
    got = tiny_m3(pool_position=position).model(**batch, num_visual_tokens=size)
    torch.testing.assert_close(got.last_hidden_state, expected, atol=1e-6, rtol=0)
    assert got.image_hidden_states.shape == (3 * size, 64)


def test_positions_differ_below_the_full_size(tiny_m3, inputs):
    after, before = (tiny_m3(pool_position=position)(**inputs(9), num_visual_tokens=9).logits for position in POSITIONS)
    assert (after - before).abs().max() > 1e-3


def test_the_default_size_comes_from_the_configuration(tiny_m3, inputs):
    model = tiny_m3(default_visual_tokens=9)
    torch.testing.assert_close(model(**inputs(9)).logits, model(**inputs(9), num_visual_tokens=9).logits)
    with pytest.raises(ValueError, match="num_visual_tokens=9"):
        model(**inputs(36))


def test_several_feature_layers_and_the_first(tiny_m3, inputs):
    model, pixels = tiny_m3(pool_position="before_projector"), inputs()["pixel_values"]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    for layers in ([1, -1], [0], [2]):
        given = layers if len(layers) > 1 else layers[0]
        expected = torch.cat([states[index][:, 1:] for index in layers], dim=-1)
        torch.testing.assert_close(model.encode_images(pixels, vision_feature_layer=given), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("size", [1, 9, 36])
def test_generation_reads_pooled_features(options, size, tiny_m3, llava_processor):
    model = tiny_m3()
    text = [f"user : <image> {QUESTION} assistant :"] * 2
    batch = llava_processor(images=pictures(2), text=text, num_visual_tokens=size, return_tensors="pt")
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    options = options | {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    ours = model.generate(**batch, num_visual_tokens=size, **options)
    assert len(runs) == 1
    states = model.encode_images(batch.pop("pixel_values"))
    features = {"image": visual_output(pool_visual_tokens(states, size))}
    theirs = LlavaForConditionalGeneration.generate(model, **batch, mm_encoder_outputs=features, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert ours.sequences.shape == (2, batch["input_ids"].shape[1] + 6)
    assert ours.scores[0][ours.scores[0].isfinite()].std() > 0.01


def test_generation_at_the_full_size_is_that_of_stock_llava(llava_path, tiny_m3, llava_processor):
    batch = llava_processor(images=pictures(1), text=TEXTS[:1], return_tensors="pt")
    stock = LlavaForConditionalGeneration.from_pretrained(llava_path)
    for options in ({}, {"num_beams": 2}):
        expected = stock.generate(**batch, max_new_tokens=5, do_sample=False, **options)
        assert torch.equal(tiny_m3().generate(**batch, max_new_tokens=5, do_sample=False, **options), expected)


def test_text_without_images(tiny_m3, llava_path, llava_processor):
    batch = llava_processor(text=["user : which digit ?"], return_tensors="pt")
    stock = LlavaForConditionalGeneration.from_pretrained(llava_path)
    torch.testing.assert_close(tiny_m3()(**batch).logits, stock(**batch).logits, atol=1e-6, rtol=0)
    assert tiny_m3().generate(**batch, max_new_tokens=2).shape[0] == 1


def broken(batch: dict, name: str) -> dict:
    batch = {key: value.clone() for key, value in batch.items()}
    if name == "pixels without a placeholder":
        batch["input_ids"][batch["input_ids"] == 4] = 8
    elif name == "a placeholder without pixels":
        del batch["pixel_values"]
    elif name == "fewer images":
        batch["pixel_values"] = batch["pixel_values"][:2]
    elif name == "images of rows mixed up":  # the sum is right, the rows are not
        placeholders = (batch["input_ids"] == 4).nonzero()
        batch["input_ids"][tuple(placeholders[-1])] = 8
        batch["input_ids"][0, -1] = 4
    return batch


WRONG = {
    "pixels without a placeholder": "input_ids: there is no image placeholder for the 3 images in pixel_values",
    "a placeholder without pixels": "pixel_values: none are given for the 27 image placeholders in input_ids",
    "fewer images": "input_ids: 9, 18 image placeholders in the rows do not match 2 images of num_visual_tokens=9",
    "images of rows mixed up": "input_ids: 10, 17 image placeholders in the rows do not match 3 images",
}


@pytest.mark.parametrize("call", ["forward", "greedy", "beam"])
@pytest.mark.parametrize("name", WRONG)
def test_placeholders_and_images_that_do_not_match_are_refused(name, call, tiny_m3, inputs):
    model, batch = tiny_m3(), broken(inputs(9), name)
    options = {"forward": {}, "greedy": {"max_new_tokens": 2}, "beam": {"max_new_tokens": 2, "num_beams": 2}}[call]
    function = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=WRONG[name]):
        function(**batch, num_visual_tokens=9, **options)


def test_other_wrong_input_is_refused(tiny_m3, inputs, llava_processor):
    model, batch = tiny_m3(), inputs(9)
    with pytest.raises(ValueError, match=r"num_visual_tokens=36; let the processor expand them"):
        model(**batch)
    five = {**batch, "input_ids": torch.full((1, 15), 4), "attention_mask": torch.ones(1, 15).long()}
    with pytest.raises(ValueError, match=r"num_visual_tokens: 5 is not allowed; .*: 1, 4, 9, 36"):
        model(**five, num_visual_tokens=5)
    with pytest.raises(ValueError, match="vision_feature_select_strategy: 37 features"):
        model(**batch, num_visual_tokens=9, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_feature_select_strategy: 'half' is unknown"):
        model.encode_images(batch["pixel_values"], vision_feature_select_strategy="half")
    with pytest.raises(ValueError, match="image_sizes: images of different sizes have no common square grid"):
        model(**batch, num_visual_tokens=9, image_sizes=torch.tensor([[24, 24]] * 3))
    with pytest.raises(ValueError, match="num_visual_tokens: 5 is not allowed"):
        llava_processor(images=pictures(1), text=TEXTS[0], num_visual_tokens=5)


def test_a_generated_placeholder_is_not_a_missing_image(tiny_m3, inputs):
    """A decoding step with a cache is not a prompt."""
    model, batch = tiny_m3(), inputs(9)
    cache = model(**batch, num_visual_tokens=9, use_cache=True).past_key_values
    ones = torch.ones(2, batch["input_ids"].shape[1] + 1).long()
    assert model(input_ids=torch.full((2, 1), 4), attention_mask=ones, past_key_values=cache).logits.shape[:2] == (2, 1)


def test_the_processor_expands_and_keeps_its_own_number(llava_processor):
    processor = copy.copy(llava_processor)
    for size in (1, 9, 36, None):
        ids = processor(images=pictures(3), text=TEXTS, num_visual_tokens=size, padding=True)["input_ids"]
        assert [row.count(4) for row in ids] == [size or 36, 2 * (size or 36)]
    assert processor.num_visual_tokens is None
    processor.num_visual_tokens = 4
    assert processor(images=pictures(1), text=TEXTS[:1])["input_ids"][0].count(4) == 4


def test_a_stock_processor_loads_unchanged(llava_processor, tmp_path):
    parts = (llava_processor.image_processor, llava_processor.tokenizer)
    shape = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    stock = LlavaProcessor(*parts, **shape, chat_template=llava_processor.chat_template)
    stock.save_pretrained(tmp_path)
    ours = MatryoshkaLlavaProcessor.from_pretrained(tmp_path)
    expected = stock(images=pictures(1), text=TEXTS[:1], return_tensors="pt")
    got = ours(images=pictures(1), text=TEXTS[:1], return_tensors="pt")
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    turns = [{"role": "user", "content": [{"type": "text", "text": "this ?"}]}]
    assert ours.apply_chat_template(turns) == stock.apply_chat_template(turns) == "user : this ? "


def test_costs_are_those_of_a_7b_llava():
    vicuna = LlamaConfig(intermediate_size=11008)
    assert sequence_length(30, num_images=1, num_visual_tokens=576) == 606
    assert kv_cache_bytes(vicuna, 606, bytes_per_value=2) == 2 * 32 * 32 * 128 * 606 * 2 == 317_718_528
    layer = 2 * 606 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 606**2 * 4096
    assert prefill_flops(vicuna, 606) == 32 * layer + 2 * 4096 * 32000
    cost = prefill_cost(vicuna, num_text_tokens=30, num_visual_tokens=576)
    assert cost == (606, 317_718_528, prefill_flops(vicuna, 606))
    assert prefill_cost(vicuna, 30, 36, num_images=2).sequence_length == 102
    with pytest.raises(ValueError, match="text_config: OPTConfig has no intermediate_size; costs are known for"):
        prefill_flops(OPTConfig(), 8)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config], ids=lambda c: c.model_type)
def test_costs_are_counted_operations_and_bytes(family, tiny_m3, llava_processor):
    """Against torch's own counter and the cache after a prompt, with grouped key-value heads."""
    config = tiny_m3().config
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config.text_config = family(vocab_size=23, num_hidden_layers=3, attn_implementation="eager", **shape)
    model = MatryoshkaLlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for size in (1, 9):
        batch = llava_processor(images=pictures(1), text=TEXTS[:1], num_visual_tokens=size, return_tensors="pt")
        tokens = model.pool_images(model.encode_images(batch.pop("pixel_values")), size)
        given = {**batch, "mm_encoder_outputs": {"image": visual_output(tokens)}, "logits_to_keep": 1}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = model(**given, use_cache=True)
        text = batch["input_ids"].shape[1] - size
        cost = model.prefill_cost(text, size)
        assert counter.get_total_flops() == cost.flops
        held = sum(t.nbytes for layer in output.past_key_values.layers for t in (layer.keys, layer.values))
        assert held == cost.kv_cache_bytes
        assert output.past_key_values.get_seq_length() == cost.sequence_length == text + size
