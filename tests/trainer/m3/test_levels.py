"""Scores of a level equal those of greedy decoding; the oracle, the cascade and the costs of a table."""

import pytest
import torch
import torch.nn.functional as F

from run_scripts.digits_m3 import QUESTION, digit_tables
from trainer.m3.conversations import ConversationCollator, check_conversations
from trainer.m3.levels import LevelScores, cascade, join_scores, level_table, oracle, score_batch

SIZES = [1, 9, 36]


@pytest.fixture(scope="module")
def rows():
    return check_conversations(digit_tables()["train"].select(range(10)))


def test_scores_equal_those_of_the_model_row_by_row(tiny_m3, llava_processor, rows):
    model, collator = tiny_m3().eval(), ConversationCollator(llava_processor, SIZES)
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    examples = [rows[index] for index in range(10)]
    scores = join_scores([score_batch(model, collator(examples[:4])), score_batch(model, collator(examples[4:]))])
    assert len(runs) == 2
    for size in SIZES:
        for index, example in enumerate(examples):
            batch = collator([example])
            level = batch["levels"][size]
            logits = model(
                **{name: level[name] for name in ("input_ids", "attention_mask")},
                pixel_values=batch["pixel_values"],
                num_visual_tokens=size,
            ).logits[0]
            places = (level["labels"][0] != -100).nonzero()[:, 0]
            losses = [F.cross_entropy(logits[place - 1].double(), level["labels"][0, place]) for place in places]
            assert scores[size].loss_sum[index].item() == pytest.approx(sum(losses).item(), abs=1e-4)
            assert scores[size].tokens[index] == 2
            first = logits[places[0] - 1].softmax(dim=-1).max()
            assert scores[size].confidence[index].item() == pytest.approx(first.item(), abs=1e-5)
            assert scores[size].prompt_tokens[index] == places[0] == 9 + size
            assert scores[size].images[index] == 1


def test_correct_answers_are_those_of_greedy_decoding(tiny_m3, llava_processor, rows):
    """The model's own answers are all correct, and changed answers are not."""
    model, prompt = tiny_m3().eval(), f"user : <image> {QUESTION} assistant :"
    # The mean of two logits is never the highest, so no answer is a placeholder.
    model.lm_head.weight.data[4] = model.lm_head.weight.data[[3, 5]].mean(dim=0)
    examples = [rows[index] for index in range(6)]
    for size in SIZES:
        batch = llava_processor(
            images=[row["images"][0] for row in examples],
            text=[prompt] * 6,
            num_visual_tokens=size,
            return_tensors="pt",
        )
        made = model.generate(**batch, num_visual_tokens=size, max_new_tokens=2, eos_token_id=None, do_sample=False)
        ids = torch.cat([batch["input_ids"], made[:, -2:]], dim=1)
        answers = torch.full_like(ids, -100)
        answers[:, -2:] = made[:, -2:]
        level = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": answers}
        assert score_batch(model, {"pixel_values": batch["pixel_values"], "levels": {size: level}})[size].correct.all()
        answers[::2, -1] = (answers[::2, -1] + 1) % 23
        scores = score_batch(model, {"pixel_values": batch["pixel_values"], "levels": {size: level}})
        assert scores[size].correct.tolist() == [False, True] * 3


def test_oracle_and_cascade_row_by_row():
    generator = torch.Generator().manual_seed(0)
    correct = {size: torch.rand(200, generator=generator) < 0.4 for size in SIZES}
    confidence = {size: torch.rand(200, generator=generator) for size in SIZES}
    chosen, right = oracle(correct)
    sure = cascade(confidence, 0.6)
    for row in range(200):
        fits = [size for size in SIZES if correct[size][row]]
        assert chosen[row] == (fits[0] if fits else 1)
        assert right[row] == bool(fits)
        assert sure[row] == next((size for size in SIZES[:-1] if confidence[size][row] >= 0.6), 36)
    assert len(set(chosen.tolist())) == len(set(sure.tolist())) == 3


def made_up(correct, confidence, prompt_tokens) -> LevelScores:
    count = len(correct)
    return LevelScores(
        loss_sum=torch.arange(count).float(),
        tokens=torch.full((count,), 2),
        correct=torch.tensor(correct),
        confidence=torch.tensor(confidence),
        prompt_tokens=torch.tensor(prompt_tokens),
        images=torch.ones(count, dtype=torch.long),
    )


def test_the_table_of_levels(tiny_m3):
    model = tiny_m3()
    levels = {
        1: made_up([True, False, False], [0.9, 0.2, 0.1], [9, 11, 13]),
        9: made_up([True, True, False], [0.9, 0.3, 0.8], [17, 19, 21]),
        36: made_up([True, True, True], [0.9, 0.3, 0.8], [44, 46, 48]),
    }
    table = level_table(model, levels, cascade_threshold=0.5)
    assert list(table) == ["1", "9", "36", "oracle", "cascade"]
    assert [table[name]["accuracy"] for name in table] == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3])
    assert table["9"]["loss"] == pytest.approx(3 / 6)
    cost = {size: [model.prefill_cost(text, size) for text in (8, 10, 12)] for size in SIZES}
    for size in SIZES:
        assert table[str(size)]["sequence_length"] == pytest.approx(10 + size)
        assert table[str(size)]["prefill_flops"] == pytest.approx(sum(c.flops for c in cost[size]) / 3)
        assert table[str(size)]["kv_cache_bytes"] == pytest.approx(sum(c.kv_cache_bytes for c in cost[size]) / 3)
    assert table["oracle"]["visual_tokens"] == pytest.approx((1 + 9 + 36) / 3)
    best = (cost[1][0], cost[9][1], cost[36][2])
    assert table["oracle"]["prefill_flops"] == pytest.approx(sum(c.flops for c in best) / 3)
    # the first row stops at 1, the second at 36, the third at 9; the costs of all levels that were tried count
    assert table["cascade"]["visual_tokens"] == pytest.approx((1 + (1 + 9 + 36) + (1 + 9)) / 3)
    paid = cost[1][0].flops + sum(cost[size][1].flops for size in SIZES) + cost[1][2].flops + cost[9][2].flops
    assert table["cascade"]["prefill_flops"] == pytest.approx(paid / 3)
    kept = (cost[1][0], cost[36][1], cost[9][2])
    assert table["cascade"]["kv_cache_bytes"] == pytest.approx(sum(c.kv_cache_bytes for c in kept) / 3)
    assert "cascade" not in level_table(model, levels)
