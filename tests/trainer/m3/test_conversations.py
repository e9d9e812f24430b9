"""Rows of images and conversations: every notation, the labels, one text per level, and wrong rows."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from trainer.m3 import conversations
from trainer.m3.conversations import (
    IGNORED,
    ConversationCollator,
    check_conversations,
    encode_conversation,
    read_conversations,
)

ASKED = {"role": "user", "content": "<image>which digit is this ?"}
ROW = [ASKED, {"role": "assistant", "content": "two"}]
LLAVA = [{"from": "human", "value": "<image>\nwhich digit is this ?"}, {"from": "gpt", "value": "two"}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which digit is this ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
]
BARE = [{"role": "user", "content": "which digit is this ?"}, {"role": "assistant", "content": "two"}]
PLAIN_WORDS = "user : <image> which digit is this ? assistant : two </s>"


def picture(shade: int = 7) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 2 * shade, 3 * shade))


@pytest.mark.parametrize("turns", [ROW, PARTS, BARE], ids=["string", "parts", "no placeholder"])
def test_notations_give_the_same_tokens(turns, llava_processor):
    table = check_conversations(Dataset.from_list([{"image": picture(), "messages": turns}]))
    ids, labels = encode_conversation(llava_processor, table[0]["messages"], num_images=1)
    words = llava_processor.tokenizer.convert_ids_to_tokens(ids)
    assert " ".join(words) == PLAIN_WORDS
    assert labels.tolist() == [IGNORED] * 10 + ids[-2:].tolist()


def test_llava_files_are_read(llava_processor, tmp_path):
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "a.png")
    rows = [
        {"id": 1, "image": "pictures/a.png", "conversations": LLAVA},
        {"id": 2, "conversations": [{"from": "human", "value": "which digit ?"}, {"from": "gpt", "value": "two"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("rows.json", "rows.jsonl"):
        table = read_conversations(str(tmp_path / name))
        ids, _ = encode_conversation(llava_processor, table[0]["messages"], 1)
        assert " ".join(llava_processor.tokenizer.convert_ids_to_tokens(ids)) == PLAIN_WORDS
        assert table[0]["images"][0].getpixel((0, 0)) == (7, 14, 21)
        assert table[1]["images"] == []
    batch = ConversationCollator(llava_processor, [9])([table[0], table[1]])
    assert batch["pixel_values"].shape == (1, 3, 24, 24)
    assert (batch["levels"][9]["input_ids"] == 4).sum(dim=1).tolist() == [9, 0]
    assert "pixel_values" not in ConversationCollator(llava_processor, [9])([table[1]])


def test_several_images_and_turns(llava_processor):
    turns = [
        {"role": "user", "content": "<image><image>which is this ?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "digit ?"},
        {"role": "assistant", "content": "six"},
    ]
    table = check_conversations(Dataset.from_list([{"images": [picture(), picture(9)], "messages": turns}]))
    ids, labels = encode_conversation(llava_processor, table[0]["messages"], 2)
    learned = llava_processor.tokenizer.convert_ids_to_tokens(ids[labels != IGNORED])
    assert learned == ["two", "six", "</s>"]
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
    with pytest.raises(ValueError, match="messages: 2 image placeholders do not match 1 images"):
        encode_conversation(llava_processor, table[0]["messages"], 1)


def test_batches_contain_every_level(llava_processor):
    turns = [ROW, [{"role": "user", "content": "<image>which ?"}, {"role": "assistant", "content": "six"}]]
    rows = [{"image": picture(i), "messages": messages} for i, messages in enumerate(turns)]
    table = check_conversations(Dataset.from_list(rows))
    batch = ConversationCollator(llava_processor, [1, 9, 36])([table[0], table[1]])
    texts = [PLAIN_WORDS, "user : <image> which ? assistant : six </s>"]
    for size, level in batch["levels"].items():
        # the processor must make the same tensors from the same texts
        expected = llava_processor(
            images=[row["images"][0] for row in table],
            text=texts,
            num_visual_tokens=size,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(level[name], expected[name])
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
        answers = level["labels"] != IGNORED
        assert answers.sum(dim=1).tolist() == [2, 2]
        assert torch.equal(level["labels"][answers], level["input_ids"][answers])
        assert not (level["labels"] == 4).any()


def one_by_one(processor, messages: list[dict], num_images: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and labels of a row at one level, token by token."""
    ids, labels = encode_conversation(processor, messages, num_images)
    repeats = [size if token == processor.image_token_id else 1 for token in ids.tolist()]
    return tuple(
        torch.tensor([token for token, count in zip(values.tolist(), repeats, strict=True) for _ in range(count)])
        for values in (ids, labels)
    )


@pytest.mark.parametrize("remember", [False, True])
def test_a_batch_is_that_of_its_rows_one_by_one(remember, llava_processor, monkeypatch):
    several = [
        {"role": "user", "content": "<image><image>which is this ?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "digit ?"},
        {"role": "assistant", "content": "six seven"},
    ]
    images = [[picture()], [picture(), picture(9)], []]
    table = check_conversations(Dataset.from_dict({"images": images, "messages": [ROW, several, BARE]}))
    rows = list(table)
    collator, calls = ConversationCollator(llava_processor, [1, 9], remember=remember), []
    tokenize = conversations.tokenize_ends
    monkeypatch.setattr(
        conversations, "tokenize_ends", lambda *args, **more: (calls.append(len(args[1])), tokenize(*args, **more))[1]
    )
    for taken in ([0, 1, 2], [2, 1]):
        batch = collator([rows[row] for row in taken])
        found = list(calls)
        for size, level in batch["levels"].items():
            expected = [one_by_one(llava_processor, rows[row]["messages"], len(images[row]), size) for row in taken]
            for (ids, labels), own, learned, mask in zip(
                expected, level["input_ids"], level["labels"], level["attention_mask"], strict=True
            ):
                length, padding = len(ids), len(own) - len(ids)
                assert own.tolist() == [*ids.tolist(), *[llava_processor.tokenizer.pad_token_id] * padding]
                assert learned.tolist() == [*labels.tolist(), *[IGNORED] * padding]
                assert mask.tolist() == [1] * length + [0] * padding
            places = level["input_ids"].flatten()[level["image_positions"]]
            assert places.tolist() == [llava_processor.image_token_id] * size * sum(len(images[row]) for row in taken)
        calls[:] = found
    assert calls[:1] == [3]
    assert calls.count(2) == (0 if remember else 1), "the second batch has no new row"
    assert batch["padded"] == [1, 9]
    assert collator([rows[0], rows[0]])["padded"] == []


def test_long_texts_are_cut(llava_processor):
    table = check_conversations(Dataset.from_list([{"image": picture(), "messages": ROW}]))
    level = ConversationCollator(llava_processor, [9], max_length=11)([table[0]])["levels"][9]
    assert level["input_ids"].shape == (1, 19)
    assert (level["labels"] != IGNORED).sum() == 1
    with pytest.raises(ValueError, match="max_length: no answer of the batch lies within 5 tokens"):
        ConversationCollator(llava_processor, [9], max_length=5)([table[0]])


WRONG_ROWS = {
    "no image column": (
        [{"messages": ROW}],
        r"columns \(messages\) lack one of image, images or one of messages, conv",
    ),
    "no text column": ([{"image": "a.png", "text": "x"}], "lack one of image"),
    "no rows": ([], "there are no rows"),
    "no answer": ([{"image": "here.png", "messages": [ASKED]}], "row 1 has no answer of the assistant"),
    "no such role": (
        [{"image": "here.png", "messages": [{"role": "robot", "content": "x"}]}],
        "row 1 has a turn of 'robot'; use system, user, human, assistant, gpt",
    ),
    "no such file": (
        [{"image": "here.png", "messages": ROW}, {"image": "absent.png", "messages": ROW}],
        r"row 2: there is no image .*absent\.png",
    ),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_rows_are_refused(name, tmp_path):
    picture().save(tmp_path / "here.png")
    rows, message = WRONG_ROWS[name]
    table = Dataset.from_list(rows) if rows else Dataset.from_dict({"image": [], "messages": []})
    with pytest.raises(ValueError, match=rf"train_dataset: .*{message}|train_dataset: {message}"):
        check_conversations(table, str(tmp_path))


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "rows.json").write_text("{")
    for name, message in (
        ("absent.json", "absent.json is not a file"),
        ("rows.csv", "rows.csv has an unknown format; use one of .json, .jsonl, .parquet"),
        ("rows.json", "rows.json could not be read"),
    ):
        with pytest.raises(ValueError, match=f"eval_file: .*{message}"):
            read_conversations(str(tmp_path / name), argument="eval_file")


def test_a_processor_without_a_template_is_refused(llava_processor):
    processor = copy.copy(llava_processor)
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat_template: the processor has none"):
        ConversationCollator(processor, [1])
    table = check_conversations(Dataset.from_list([{"image": picture(), "messages": ROW}]))
    for damaged in ("{% for", "{{ messages | novel }}", "{{ raise_exception('no') }}"):
        processor.chat_template = damaged
        with pytest.raises(ValueError, match="chat_template: the processor's template cannot be applied: "):
            encode_conversation(processor, table[0]["messages"], 1)
    processor.chat_template = "{{ messages | length }}" + llava_processor.chat_template
    with pytest.raises(ValueError, match="chat_template: the text of the first turns must not change"):
        encode_conversation(processor, table[0]["messages"], 1)
