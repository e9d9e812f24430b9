"""Whole-word masks for masked-autoencoder pre-training: few words for the encoder, these and more for the decoder."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_2dmse.tokens import tokenize_words

# Label of a token that is not predicted.
IGNORED = -100
# Fractions of the chosen tokens that become the mask token or a random one; the rest stay (BERT, section 3.1).
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer that cannot be used for masking."""
    name = type(tokenizer).__name__
    if tokenizer.mask_token_id is None:
        raise ValueError(f"tokenizer: {name} has no mask token, which masked-word prediction needs")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {name} is not a fast tokenizer; only these know which tokens form a word")
    if tokenizer("a").input_ids[0] not in tokenizer.all_special_ids:
        raise ValueError(f"tokenizer: {name} puts no special token first, but SMAE's decoder needs its state")


class WholeWordMasks:
    """Draws the words that the encoder and the decoder have to predict.

    The rates are shares of a text's words. In Starbucks' code they are shares of its tokens, the special ones included.

    Args:
        encoder_rate: fraction of a text's words that are masked for the encoder.
        decoder_rate: fraction that is masked for the decoder, at least `encoder_rate`; it includes the encoder's words.
    """

    def __init__(self, encoder_rate: float, decoder_rate: float):
        self.encoder_rate = encoder_rate
        self.decoder_rate = decoder_rate

    def __call__(self, words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the masks of a batch.

        Args:
            words: (batch, length), the number of each token's word within its text, -1 for special tokens and padding.
            rng: the random generator.

        Returns:
            two boolean masks (batch, length), of the encoder and of the decoder. In each text, rate * words words are
            masked, rounded up or down at random so that the mean over texts is the rate.
        """
        texts, columns = np.nonzero(words >= 0)
        # A word is a run of tokens with the same number; in packed texts, a number can appear again.
        number = words[texts, columns]
        starts = np.ones(len(texts), dtype=bool)
        starts[1:] = (texts[1:] != texts[:-1]) | (number[1:] != number[:-1]) | (columns[1:] != columns[:-1] + 1)
        word_of_token = starts.cumsum() - 1
        text_of_word = texts[starts]
        counts = np.bincount(text_of_word, minlength=len(words))
        # The position of each word in a random order of the words of its text.
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
    """Turns texts, or packed blocks of tokens, into a batch for `StarbucksForMaskedAutoencoding`.

    `attention_mask` is None if no text is padded.

    Examples are `{"text": str}`, or `{"input_ids": [...], "words": [...]}` without special tokens. Examples of an
    endless stream also have a `position`, which replaces the epoch.

    All random choices are a function of the seed, the process, the epoch and the batch itself. They are the same after
    a resume, in a worker process and in the next run, and different in another process or epoch.

    Args:
        tokenizer: a fast tokenizer with a mask token.
        max_length: maximum length of a text in tokens; longer texts are cropped at random.
        encoder_rate: fraction of words that are masked for the encoder.
        decoder_rate: fraction of words that are masked for the decoder.
        seed: seed of the run.
        process_index: number of the process.
        pad_to_multiple_of: the length of a batch is a multiple of this.

    Attributes:
        epoch: set by a callback of the trainer.
        hides_all: replace every chosen token by the mask token, for evaluations. In training, a tenth of them stay as
            they are, and a model could predict these by copying.

    Raises:
        ValueError: the tokenizer cannot be used for masking.
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
        self.is_special = np.zeros(len(tokenizer), dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.replacements = torch.from_numpy(np.flatnonzero(~self.is_special))
        self.before, self.after = special_tokens_around(tokenizer)

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor | None]:
        ids, words, lengths = self._flat(examples)
        key = [examples[0].get("position", 0), zlib.crc32(ids.tobytes())]
        rng = np.random.default_rng([self.seed, self.process_index, self.epoch, *key])
        tokens, numbers, attention = self._pad(*self._crop(ids, words, lengths, rng))
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
            "masked": encoder.flatten().nonzero().squeeze(1),
            "decoder_masked": decoder.flatten().nonzero().squeeze(1),
        }

    def _flat(self, examples: Sequence[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and word numbers, (tokens,), and lengths, (texts,)."""
        if "text" in examples[0]:
            tokens, words = tokenize_words(self.tokenizer, [example["text"] for example in examples])
            return tokens.ids, words, tokens.lengths
        rows, numbers = (
            [np.asarray(example[name], dtype=np.int64) for example in examples] for name in ("input_ids", "words")
        )
        return np.concatenate(rows), np.concatenate(numbers), np.array([len(row) for row in rows])

    def _crop(self, ids, words, lengths, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        room = self.max_length - len(self.before) - len(self.after)
        long = np.flatnonzero(lengths > room)
        if not len(long):
            return ids, words, lengths
        first = np.cumsum(lengths) - lengths
        kept = np.minimum(lengths, room)
        # Drawn one by one: a draw of all at once would use other random numbers.
        first[long] += [int(rng.integers(lengths[row] - room + 1)) for row in long]
        index = np.arange(kept.sum()) + np.repeat(first - (np.cumsum(kept) - kept), kept)
        return ids[index], words[index], kept

    def _pad(self, ids, words, lengths) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
        first, around = len(self.before), len(self.before) + len(self.after)
        width = int(lengths.max()) + around
        width += -width % self.pad_to_multiple_of
        width = min(width, self.max_length)
        tokens = np.full((len(lengths), width), self.tokenizer.pad_token_id, dtype=np.int64)
        numbers, columns = np.full(tokens.shape, -1, dtype=np.int64), np.arange(width)[None]
        inside = (columns >= first) & (columns < first + lengths[:, None])
        tokens[:, :first] = self.before
        tokens[inside] = ids
        numbers[inside] = np.where(self.is_special[ids], -1, words)
        ends = first + lengths[:, None] + np.arange(len(self.after))[None]
        tokens[np.arange(len(lengths))[:, None], ends] = self.after
        attention = columns < around + lengths[:, None]
        # Without padding there is no mask, so that a GPU uses its faster attention without looking at a mask's values.
        mask = None if attention.all() else torch.from_numpy(attention.astype(np.int64))
        return torch.from_numpy(tokens), numbers, mask

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
    """The ids that the tokenizer puts before and after a text."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
