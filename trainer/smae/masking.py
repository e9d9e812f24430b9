"""Whole-word masks for masked-autoencoder pre-training: a light one for the encoder inside a heavy one."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

# Label of a token that is not to be predicted.
IGNORED = -100
# Of the chosen tokens, so many become the mask token, and so many a random one; the rest stay (BERT, section 3.1).
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer that cannot be used for masking."""
    name = type(tokenizer).__name__
    if tokenizer.mask_token_id is None:
        raise ValueError(f"tokenizer: {name} has no mask token, so that its model cannot fill in masked words")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {name} is not a fast one, which alone says which tokens make a word")
    if tokenizer("a").input_ids[0] not in tokenizer.all_special_ids:
        raise ValueError(f"tokenizer: {name} puts no special token first, whose state SMAE's decoder needs")


class WholeWordMasks:
    """
    Draws the words that the encoder and the decoder have to predict.

    Args:
        encoder_rate: share of a text's words masked for the encoder.
        decoder_rate: share masked for the decoder, at least `encoder_rate`; the encoder's words are among them.
    """

    def __init__(self, encoder_rate: float, decoder_rate: float):
        self.encoder_rate = encoder_rate
        self.decoder_rate = decoder_rate

    def __call__(self, words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            words: (batch, length) number of each token's word within its text, -1 for special tokens and padding.

        Returns:
            two boolean (batch, length) masks, encoder's and decoder's. Each text has rate * words masked words, rounded
            up or down at random such that the mean over texts is the rate.
        """
        texts, columns = np.nonzero(words >= 0)
        # A word is a run of tokens with one number: numbers may come back where texts are packed.
        number = words[texts, columns]
        starts = np.ones(len(texts), dtype=bool)
        starts[1:] = (texts[1:] != texts[:-1]) | (number[1:] != number[:-1]) | (columns[1:] != columns[:-1] + 1)
        word_of_token = starts.cumsum() - 1
        text_of_word = texts[starts]
        counts = np.bincount(text_of_word, minlength=len(words))
        # The place of each word in a random order of its text's words.
        order = np.lexsort((rng.random(len(text_of_word)), text_of_word))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order)) - (counts.cumsum() - counts)[text_of_word[order]]
        rounding = rng.random(len(words))
        masks = []
        for rate in (self.encoder_rate, self.decoder_rate):
            chosen = place < np.floor(rate * counts + rounding)[text_of_word]
            mask = np.zeros(words.shape, dtype=bool)
            mask[texts, columns] = chosen[word_of_token]
            masks.append(mask)
        return masks[0], masks[1]


class MaskingCollator:
    """
    Turns texts, or packed blocks of tokens, into a batch for [`StarbucksForMaskedAutoencoding`].

    All random choices are a function of (seed, process, epoch, the batch itself): the same after a resume, in a worker
    and in the next run, other ones in another process or epoch.

    Args:
        tokenizer: a fast one with a mask token.
        max_length: of a text, in tokens; a longer one is cropped at random.
        encoder_rate, decoder_rate: shares of masked words.
        seed, process_index: of the run.
        pad_to_multiple_of: of the batch's length.

    `epoch` is set from outside; with `hides_all`, for measuring, every chosen token becomes the mask token: one that is
    left as it is (0.1 of them in training) would be found by copying it.

    Examples are {"text": str}, or {"input_ids": [...], "words": [...]} without special tokens; those of an endless
    stream carry a "position", which takes the epoch's place.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        encoder_rate: float = 0.2,
        decoder_rate: float = 0.4,
        seed: int = 0,
        process_index: int = 0,
        pad_to_multiple_of: int = 8,
    ):
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.masks = WholeWordMasks(encoder_rate, decoder_rate)
        self.seed = seed
        self.process_index = process_index
        self.pad_to_multiple_of = pad_to_multiple_of
        self.epoch = 0
        self.hides_all = False
        special = set(tokenizer.all_special_ids)
        self.replacements = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        self.before, self.after = special_tokens_around(tokenizer)

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = tokenize_words(self.tokenizer, [e["text"] for e in examples]) if "text" in examples[0] else examples
        ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        words = [np.asarray(row["words"], dtype=np.int64) for row in rows]
        key = [examples[0].get("position", 0), zlib.crc32(np.concatenate(ids).tobytes())]
        rng = np.random.default_rng([self.seed, self.process_index, self.epoch, *key])
        ids, words = self._crop(ids, words, rng)
        tokens, numbers, attention = self._pad(ids, words)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        encoder, decoder = (torch.from_numpy(mask) for mask in self.masks(numbers, rng))
        input_ids, labels = self._hide(tokens, encoder, generator)
        decoder_input_ids, decoder_labels = self._hide(tokens, decoder, generator)
        return {
            "input_ids": input_ids,
            "attention_mask": attention,
            "labels": labels,
            "decoder_input_ids": decoder_input_ids,
            "decoder_labels": decoder_labels,
        }

    def _crop(self, ids, words, rng):
        room = self.max_length - len(self.before) - len(self.after)
        starts = [int(rng.integers(len(row) - room + 1)) if len(row) > room else 0 for row in ids]
        cut = [slice(start, start + room) for start in starts]
        return [row[c] for row, c in zip(ids, cut, strict=True)], [row[c] for row, c in zip(words, cut, strict=True)]

    def _pad(self, ids, words) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        first, around = len(self.before), len(self.before) + len(self.after)
        width = max(len(row) for row in ids) + around
        width += -width % self.pad_to_multiple_of
        width = min(width, self.max_length)
        tokens = np.full((len(ids), width), self.tokenizer.pad_token_id, dtype=np.int64)
        numbers, attention = np.full(tokens.shape, -1, dtype=np.int64), np.zeros(tokens.shape, dtype=np.int64)
        special = np.asarray(self.tokenizer.all_special_ids)
        for row, (text, word) in enumerate(zip(ids, words, strict=True)):
            end = len(text) + around
            tokens[row, :end] = np.concatenate((self.before, text, self.after))
            numbers[row, first : first + len(text)] = np.where(np.isin(text, special), -1, word)
            attention[row, :end] = 1
        return torch.from_numpy(tokens), numbers, torch.from_numpy(attention)

    def _hide(self, tokens: torch.Tensor, mask: torch.Tensor, generator) -> tuple[torch.Tensor, torch.Tensor]:
        labels = tokens.masked_fill(~mask, IGNORED)
        fate = torch.rand(tokens.shape, generator=generator)
        draw = torch.randint(len(self.replacements), tokens.shape, generator=generator)
        if self.hides_all:
            return tokens.masked_fill(mask, self.tokenizer.mask_token_id), labels
        hidden = tokens.masked_fill(mask & (fate < MASKED_SHARE), self.tokenizer.mask_token_id)
        random = mask & (fate >= MASKED_SHARE) & (fate < MASKED_SHARE + RANDOM_SHARE)
        return torch.where(random, self.replacements[draw], hidden), labels


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def tokenize_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[dict]:
    """One {"input_ids", "words"} a text, without special tokens; `words` numbers each token's word."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    rows = []
    for index, ids in enumerate(encoded["input_ids"]):
        words = [-1 if word is None else word for word in encoded.word_ids(index)]
        rows.append({"input_ids": ids, "words": words})
    return rows
