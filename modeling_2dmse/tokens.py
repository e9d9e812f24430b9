"""Texts as token ids in flat arrays, and batches made of them: padded, or packed into one row."""

import itertools
import json
import os
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .packing import Packing, to_device

# Tokenizers without a limit have a very large number as theirs.
_UNLIMITED = 10**9
# No text that UTF-8 can hold has one; they come from JSON, or from bytes of a command line that are not UTF-8.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some texts, one text after another.

    Args:
        ids: (tokens,), int64.
        starts: (texts + 1,), int64: the first token of each text, and the number of all tokens.
        type_ids: (tokens,), int64; None if they are all 0, the default of every model.
        pad_id: the token that fills up padded rows.
    """

    ids: np.ndarray
    starts: np.ndarray
    type_ids: np.ndarray | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(texts,), int64: tokens of each text."""
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> "Tokens":
        """The texts of the given row numbers, in their order."""
        lengths = self.lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(starts[-1]) + np.repeat(self.starts[:-1][rows] - starts[:-1], lengths)
        types = None if self.type_ids is None else self.type_ids[index]
        return Tokens(self.ids[index], starts, types, self.pad_id)

    def padded(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and, unless they are all 0, `token_type_ids`: (texts, longest), padded on the
        right whatever side the tokenizer is set to."""
        real = np.arange(self.lengths.max(initial=1))[None] < self.lengths[:, None]
        arrays = {"input_ids": np.full(real.shape, self.pad_id), "attention_mask": real.astype(np.int64)}
        arrays["input_ids"][real] = self.ids
        if self.type_ids is not None:
            arrays["token_type_ids"] = np.zeros(real.shape, dtype=np.int64)
            arrays["token_type_ids"][real] = self.type_ids
        return {name: to_device(array, torch.device(device)) for name, array in arrays.items()}

    def packed(self, device: torch.device | str = "cpu") -> dict:
        """`input_ids` and, unless they are all 0, `token_type_ids`: (1, tokens); and `packing`."""
        device = torch.device(device)
        arrays = {"input_ids": self.ids} | ({} if self.type_ids is None else {"token_type_ids": self.type_ids})
        batch: dict = {name: to_device(array[None], device) for name, array in arrays.items()}
        return batch | {"packing": Packing(self.lengths, device)}


def from_rows(rows: Sequence[np.ndarray], pad_id: int) -> Tokens:
    """The tokens of texts that were tokenized before, from the ids of each; all token types are 0."""
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Tokens(np.concatenate(rows), starts, None, pad_id)


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of all texts of several parts, one part after another."""
    types = None
    if any(part.type_ids is not None for part in parts):
        types = np.concatenate([np.zeros_like(p.ids) if p.type_ids is None else p.type_ids for p in parts])
    starts = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
    return Tokens(np.concatenate([part.ids for part in parts]), starts, types, parts[0].pad_id)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, second: Sequence[str] | None = None
) -> Tokens:
    """Tokenize texts, or pairs of them with the texts of `second`, truncated to `max_length` tokens.

    A text without any token (an empty one, if the tokenizer adds no special tokens) becomes one padding token, so that
    it has an embedding, the same in every batch.
    """
    pad_id = tokenizer.pad_token_id or 0
    if not tokenizer.is_fast:
        others = None if second is None else list(second)
        encoded = tokenizer(list(texts), others, truncation=True, max_length=max_length, padding=False)
        return _flatten(encoded["input_ids"], encoded.get("token_type_ids"), pad_id)
    backend, has_types = _backend(tokenizer, max_length, second is not None)
    items = texts if second is None else zip(texts, second, strict=True)
    try:
        encodings = backend.encode_batch_fast(list(items))
    except (TypeError, UnicodeEncodeError) as error:
        wrong = next((number for number, text in enumerate(texts) if _SURROGATE.search(text)), None)
        if wrong is None:
            raise
        raise ValueError(f"texts: item {wrong} has half of a surrogate pair, which is not valid Unicode") from error
    types = [encoding.type_ids for encoding in encodings] if has_types else None
    return _flatten([encoding.ids for encoding in encodings], types, pad_id)


def tokenize_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tokens, np.ndarray]:
    """Tokenize whole texts with a fast tokenizer, without special tokens.

    Returns:
        The tokens, of which a text may have none; and (tokens,), int64, the number of each token's word in its text, -1
        for a token of no word.
    """
    backend, _ = _backend(tokenizer, None)
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    ids, words = [encoding.ids for encoding in encodings], [encoding.word_ids for encoding in encodings]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    numbers = (-1 if word is None else word for word in itertools.chain.from_iterable(words))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=starts[-1])
    found = np.fromiter(numbers, dtype=np.int64, count=starts[-1])
    return Tokens(tokens, starts, None, tokenizer.pad_token_id or 0), found


def tokenize_ends(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool
) -> tuple[Tokens, np.ndarray]:
    """Tokenize whole texts with a fast tokenizer.

    Returns:
        The tokens, of which a text may have none; and (tokens,), int64, where each token ends in its text: the number
        of characters before its end, 0 for a special token that is not in the text.
    """
    backend, _ = _backend(tokenizer, None)
    encodings = backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
    ids = [encoding.ids for encoding in encodings]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=starts[-1])
    spans = itertools.chain.from_iterable(encoding.offsets for encoding in encodings)
    places = np.fromiter(itertools.chain.from_iterable(spans), dtype=np.int64, count=2 * starts[-1])
    return Tokens(tokens, starts, None, tokenizer.pad_token_id or 0), places[1::2]


# A tokenizer's own settings are never changed: they would be saved with it, and another thread may be using them.
_backends: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _backend(tokenizer: PreTrainedTokenizerBase, max_length: int | None, pairs: bool = False):
    """A copy of a fast tokenizer that truncates to `max_length`, if any, and whether its token types are other than 0
    for texts, or for pairs of texts."""
    side = tokenizer.truncation_side
    key = (max_length, side, len(tokenizer), pairs)
    with _lock:
        known = _backends.setdefault(tokenizer, {})
        if key not in known:
            # Through its JSON, as if it were saved and loaded.
            backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
            backend.no_padding()
            backend.no_truncation()
            if max_length is not None:
                backend.enable_truncation(max_length, direction=side)
            types = "token_type_ids" in tokenizer.model_input_names
            known[key] = backend, types and any(backend.encode("a", "a" if pairs else None).type_ids)
        return known[key]


def lower_cased(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, changed so that it lower-cases texts first, as sentence-transformers' `do_lower_case` does.

    Raises:
        ValueError: it is not a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} cannot be made to lower-case texts; use a fast one")
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    present = [state["normalizer"]] if state["normalizer"] else []
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *present]}
    backend.normalizer = type(backend).from_str(json.dumps(state)).normalizer
    return tokenizer


def finish_tokenizer(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Make a saved tokenizer truncate to `max_length`, for clients that read no more than its files, and name its class
    as every version of transformers does.

    transformers sets truncation in each call, and saves whatever the last call or the original file had: in
    tokenizer.json, and as `max_length` in tokenizer_config.json, which fastembed reads.
    """
    limited = max_length < _UNLIMITED
    path = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(path):
        side = tokenizer.truncation_side.capitalize()
        cut = {"direction": side, "max_length": max_length, "strategy": "LongestFirst", "stride": 0}
        _update_json(path, {"truncation": cut if limited else None}, ensure_ascii=False)
    path = os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(path):
        values: dict = {"model_max_length": max_length} if limited else {}
        if type(tokenizer) is PreTrainedTokenizerFast:
            values["tokenizer_class"] = "PreTrainedTokenizerFast"  # version 5 writes TokenizersBackend, its other name
        _update_json(path, values, remove=("max_length",))


def _update_json(path: str, values: dict, remove: Sequence[str] = (), **options) -> None:
    with open(path, encoding="utf-8") as file:
        state = json.load(file)
    state = {name: value for name, value in state.items() if name not in remove} | values
    with open(path, "w", encoding="utf-8") as file:
        json.dump(state, file, indent=2, **options)


def _flatten(ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, pad_id: int) -> Tokens:
    if not all(ids):
        ids = [row or [pad_id] for row in ids]
        types = None if types is None else [row or [0] for row in types]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)]).astype(np.int64)
    flat = [
        np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=starts[-1])
        for rows in (ids, types)
        if rows is not None
    ]
    types_of = flat[1] if len(flat) == 2 and flat[1].any() else None
    return Tokens(flat[0], starts, types_of, pad_id)
