"""Conversations about images: reading rows, turning them into tokens, and making batches with every visual level."""

import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset

from modeling_2dmse.tokens import Tokens, from_rows, tokenize_ends

from ..shared import pictures
from ..shared.tables import READ_ERRORS, load_file, read_reason

IGNORED = -100
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# The ids of a conversation, (length,), and whether the assistant speaks there.
Encoded = tuple[np.ndarray, np.ndarray]


def read_conversations(path: str, image_dir: str | None = None, argument: str = "train_file") -> Dataset:
    """Read rows of images and a conversation from a json file (a list, as LLaVA's), a jsonl or a parquet file.

    Args:
        path: the file.
        image_dir: the folder that image paths start from; by default the folder of the file.
        argument: the name that errors give to the file.

    Returns:
        the table that `check_conversations` returns.

    Raises:
        ValueError: the file cannot be read, or a row is wrong.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{argument}: {path} is not a file")
    suffix = os.path.splitext(path.lower())[1]
    if suffix not in BUILDERS:
        raise ValueError(f"{argument}: {path} has an unknown format; use one of {', '.join(BUILDERS)}")
    try:
        table = load_file(BUILDERS[suffix], path)
    except READ_ERRORS as error:
        raise ValueError(f"{argument}: {path} could not be read: {read_reason(error)}") from error
    return check_conversations(table, image_dir or os.path.dirname(path), argument)


def check_conversations(table: Dataset, image_dir: str = "", argument: str = "train_dataset") -> Dataset:
    """Check rows of images and conversations, and bring them into one form.

    Args:
        table: rows with `image` or `images` (images, or paths inside `image_dir`), and `messages` (role, content) or
            `conversations` (from, value).
        image_dir: the folder that image paths start from.
        argument: the name that errors give to the table.

    Returns:
        rows with the columns `images` (a list of any length) and `messages`; image files are opened when a row is read.

    Raises:
        ValueError: a column is missing, there are no rows, a conversation has no answer, or an image file is missing or
            is no image.
    """
    names = table.column_names
    image = next((name for name in ("images", "image") if name in names), None)
    text = next((name for name in ("messages", "conversations") if name in names), None)
    if image is None or text is None:
        raise ValueError(
            f"{argument}: the columns ({', '.join(names)}) lack one of image, images or one of messages, conversations"
        )
    if len(table) == 0:
        raise ValueError(f"{argument}: there are no rows")
    files = table.select_columns([image]).cast_column(image, _undecoded(table.features[image]))
    for number, (turns, row) in enumerate(zip(table[text], files, strict=True), start=1):
        place = f"{argument}: row {number}"
        if not any(turn["role"] == "assistant" for turn in _messages(turns, place)):
            raise ValueError(f"{place} has no answer of the assistant to train on or to score")
        for path in _listed(row[image]):
            if isinstance(path, str) and not os.path.isfile(os.path.join(image_dir, path)):
                raise ValueError(f"{place}: there is no image {os.path.join(image_dir, path)}")
            pictures.check_kind(path, f"{place}: {_name(path)}", image_dir)
    root = os.path.abspath(image_dir)
    return table.select_columns([image, text]).with_transform(
        lambda rows: {
            "images": [[_open(value, root, argument) for value in _listed(values)] for values in rows[image]],
            "messages": [_messages(turns, argument) for turns in rows[text]],
        }
    )


def encode_conversation(
    processor: Any, messages: list[dict], num_images: int, max_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of a conversation, with one placeholder per image, and the labels of the assistant's tokens.

    The processor's chat template decides where the assistant speaks. The last answer ends with the end-of-text token.

    Args:
        processor: LLaVA's processor, with a chat template.
        messages: the turns, as `check_conversations` returns them.
        num_images: number of images of the row.
        max_length: maximum length in tokens; a longer conversation is cut at the end.

    Returns:
        two tensors (length,): the ids, and the labels, which are -100 where the assistant does not speak.

    Raises:
        ValueError: the chat template is damaged or does not write turn after turn, or placeholders and images differ in
            number.
    """
    ((ids, spoken),) = _encode(processor, [(messages, num_images)], max_length)
    return torch.from_numpy(ids), torch.from_numpy(np.where(spoken, ids, IGNORED))


class ConversationCollator:
    """Makes a batch of rows from `check_conversations`: the images once, and the texts once for each visual level.

    A batch contains `pixel_values` (images, channels, height, width), if there are images; `levels`: for each size a
    dictionary of `input_ids`, `attention_mask` and `labels`, (rows, length), padded on the right, and
    `image_positions`, (visual tokens,), the places of the placeholders in `input_ids`, flattened; and `padded`, the
    sizes at which a row has padding.

    Args:
        processor: LLaVA's processor, with a chat template.
        sizes: the numbers of visual tokens; each placeholder is repeated that often.
        max_length: maximum length of a text in tokens, where an image counts as one; longer texts are cut at the end.
        remember: keep the tokens of every conversation, for tables that are read more than once.

    Raises:
        ValueError: the processor has no chat template.
    """

    def __init__(self, processor: Any, sizes: Sequence[int], max_length: int | None = None, remember: bool = False):
        if processor.chat_template is None:
            raise ValueError("chat_template: the processor has none, which is needed to write conversations as text")
        self.processor = processor
        self.sizes = list(sizes)
        self.max_length = max_length
        self._known: dict[str, Encoded] | None = {} if remember else None

    def __call__(self, rows: list[dict]) -> dict:
        images = [image for row in rows for image in row["images"]]
        encoded = self._encode([(row["messages"], len(row["images"])) for row in rows])
        tokens = from_rows([ids for ids, _ in encoded], self._pad_id())
        spoken = np.concatenate([own for _, own in encoded])
        if not spoken.any():
            raise ValueError(f"max_length: no answer of the batch lies within {self.max_length} tokens")
        levels = {size: self._level(tokens, spoken, size) for size in self.sizes}
        padded = [size for size, level in levels.items() if not level["attention_mask"].all()]
        batch: dict = {"levels": levels, "padded": padded}
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch

    def _encode(self, conversations: list[tuple[list[dict], int]]) -> list[Encoded]:
        if self._known is None:
            return _encode(self.processor, conversations, self.max_length)
        keys = [repr(conversation) for conversation in conversations]
        new = {key: one for key, one in zip(keys, conversations, strict=True) if key not in self._known}
        self._known.update(zip(new, _encode(self.processor, list(new.values()), self.max_length), strict=True))
        return [self._known[key] for key in keys]

    def _level(self, tokens: Tokens, spoken: np.ndarray, size: int) -> dict[str, torch.Tensor]:
        repeats = np.where(tokens.ids == self.processor.image_token_id, size, 1)
        starts = np.concatenate([[0], np.cumsum(repeats)])[tokens.starts]
        level = Tokens(np.repeat(tokens.ids, repeats), starts, None, tokens.pad_id)
        batch = level.padded()
        real = batch["attention_mask"].bool().numpy()
        labels = np.full(real.shape, IGNORED)
        labels[real] = np.where(np.repeat(spoken, repeats), level.ids, IGNORED)
        placeholders = (batch["input_ids"].numpy() == self.processor.image_token_id) & real
        positions = np.flatnonzero(placeholders)
        return batch | {"labels": torch.from_numpy(labels), "image_positions": torch.from_numpy(positions)}

    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _encode(processor: Any, conversations: Sequence[tuple[list[dict], int]], max_length: int | None) -> list[Encoded]:
    """The tokens of conversations, each with its number of images, from one call of the tokenizer."""
    tokenizer, written = processor.tokenizer, [_write(processor, *one) for one in conversations]
    # The template may write the first token itself.
    opened = [tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token) for text, _ in written]
    found: dict[int, Encoded] = {}
    for kind in set(opened):
        rows = [row for row, own in enumerate(opened) if own is kind]
        tokens, ends = tokenize_ends(tokenizer, [written[row][0] for row in rows], add_special_tokens=not kind)
        for row, start, stop in zip(rows, tokens.starts[:-1], tokens.starts[1:], strict=True):
            part = slice(start, stop if max_length is None else min(stop, start + max_length))
            ids, spans = tokens.ids[part], np.array(written[row][1], dtype=np.int64).reshape(-1, 2)
            # The first span that does not end before the token does; spans follow each other.
            span = np.searchsorted(spans[:, 1], ends[part])
            firsts = np.append(spans[:, 0], np.iinfo(np.int64).max)
            found[row] = ids, ends[part] > firsts[span]
            count, num_images = int((ids == processor.image_token_id).sum()), conversations[row][1]
            if count != num_images:
                raise ValueError(f"messages: {count} image placeholders do not match {num_images} images")
    return [found[row] for row in range(len(conversations))]


def _write(processor: Any, messages: list[dict], num_images: int) -> tuple[str, list[list[int]]]:
    """A conversation as text, and the first and last character of each answer."""
    messages = _with_images(messages, processor.image_token, num_images)
    text = _apply_template(processor, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _apply_template(processor, messages[:index], add_generation_prompt=True)
            last = index + 1 == len(messages)
            after = text if last else _apply_template(processor, messages[: index + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError("chat_template: the text of the first turns must not change when more turns follow")
            spans.append([len(before), len(after)])
    end = processor.tokenizer.eos_token or ""
    if messages[-1]["role"] == "assistant" and not text.rstrip().endswith(end):
        text += end
        spans[-1][1] = len(text)
    return text, spans


def _apply_template(processor: Any, messages: list[dict], **options: bool) -> str:
    """The turns as the processor's chat template writes them; ValueError if the template is damaged."""
    import jinja2  # what transformers applies templates with, an optional library

    try:
        return processor.apply_chat_template(messages, **options)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: the processor's template cannot be applied: {error}") from error


def _messages(turns, place: str) -> list[dict]:
    """Turns of either notation as role and content; ValueError for an unknown role or other content than texts and
    images."""
    turns, messages = [] if turns is None else turns, []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{place} has no list of turns, each with its role and content, but {str(turns)[:80]!r}")
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES or content is None:
            raise ValueError(f"{place} has a turn of {role!r}; use {', '.join(ROLES)}, each with its content")
        if not isinstance(content, str):
            content = _parts(content, place)
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _parts(content, place: str) -> list[dict]:
    """The parts of a turn; ValueError unless each is a text or an image."""
    parts: list = content if isinstance(content, list) else [None]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise ValueError(
                f"{place} has the content {str(content)[:80]!r}; use a text, or parts of type text or image"
            )
    # In a table, every part has all keys.
    return [{key: value for key, value in part.items() if value is not None} for part in parts]


def _with_images(messages: list[dict], image_token: str, num_images: int) -> list[dict]:
    """Contents as lists of parts; if no turn has a placeholder, the images come before the first question."""
    result = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            count = content.count(image_token)
            words = content.replace(image_token, "").strip() if count else content
            content = [{"type": "image"}] * count + [{"type": "text", "text": words}]
        result.append({"role": message["role"], "content": content})
    named = sum(part["type"] == "image" for message in result for part in message["content"])
    asked = next((message for message in result if message["role"] == "user"), None)
    if named == 0 and asked is not None:
        asked["content"] = [{"type": "image"}] * num_images + asked["content"]
    return result


def _undecoded(feature):
    """The same feature, but its images are not decoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature))
    return feature


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _name(value) -> str:
    """What an error calls an image of a table."""
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) else "an image"


def _open(value, root: str, argument: str):
    """An image from the value in a table: the image, its path inside `root`, or its bytes."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    with pictures.reading(f"{argument}: {_name(value)}"), Image.open(pictures.source(value, root)) as image:
        return image.convert("RGB")
