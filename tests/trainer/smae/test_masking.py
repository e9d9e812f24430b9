"""Whole-word masks: their rates, tokens that are never masked, and reproducibility."""

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.smae.masking import IGNORED, MaskingCollator, WholeWordMasks, tokenize_words

TEXTS = [" ".join(SENTENCES[start : start + 3]) for start in range(len(SENTENCES))] * 40  # about 20,000 words


def _train(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of each kind, trained on the sentences, so that most words have several tokens."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)
    elif kind == "byte-level bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    else:
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    raw.train_from_iterator(SENTENCES, trainer)
    ids = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    names = dict(zip(["pad_token", "unk_token", "bos_token", "eos_token", "mask_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, cls_token="<s>", sep_token="</s>", **names)


@pytest.fixture(scope="module", params=["wordpiece", "byte-level bpe", "sentencepiece"])
def pieces(request):
    return _train(request.param)


def _batch(tokenizer, texts=TEXTS, **kwargs):
    return MaskingCollator(tokenizer, 128, **kwargs)([{"text": text} for text in texts])


def _words(tokenizer, texts, width):
    """Word numbers from spaces only: the word of each token's first letter; -1 for special tokens and padding."""
    numbers = np.full((len(texts), width), -1)
    encoded = tokenizer(texts, return_offsets_mapping=True)
    for row, (text, offsets) in enumerate(zip(texts, encoded["offset_mapping"], strict=True)):
        for column, (start, end) in enumerate(offsets[1:-1], start=1):
            letter = start + len(text[start:end]) - len(text[start:end].lstrip())
            numbers[row, column] = text[: letter + 1].count(" ")
    return numbers


def test_rates_containment_and_whole_words(pieces):
    batch = _batch(pieces)
    encoder, decoder = batch["labels"] != IGNORED, batch["decoder_labels"] != IGNORED
    words = _words(pieces, TEXTS, encoder.shape[1])
    assert (words >= 0).sum() > 1.5 * sum(len(text.split()) for text in TEXTS)  # most words have several tokens
    assert not (encoder & ~decoder).any()
    total, chosen = 0, {"encoder": 0, "decoder": 0}
    for row, numbers in enumerate(words):
        for word in range(numbers.max() + 1):
            tokens = torch.from_numpy(numbers == word)
            total += 1
            for name, mask in (("encoder", encoder), ("decoder", decoder)):
                assert mask[row][tokens].all() or not mask[row][tokens].any(), "a word is masked only in part"
                chosen[name] += bool(mask[row][tokens].all())
    assert total > 10_000
    assert chosen["encoder"] / total == pytest.approx(0.2, abs=0.01)
    assert chosen["decoder"] / total == pytest.approx(0.4, abs=0.01)


def test_special_tokens_and_padding_are_never_masked(pieces):
    batch = _batch(pieces)
    plain = pieces(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    plain = torch.nn.functional.pad(plain, (0, batch["input_ids"].shape[1] - plain.shape[1]), value=pieces.pad_token_id)
    special = torch.isin(plain, torch.tensor(pieces.all_special_ids))
    for ids, labels in (("input_ids", "labels"), ("decoder_input_ids", "decoder_labels")):
        masked = batch[labels] != IGNORED
        assert not (masked & special).any()
        assert torch.equal(batch[ids][~masked], plain[~masked])
        assert torch.equal(batch[labels][masked], plain[masked])
    assert torch.equal(batch["attention_mask"], (plain != pieces.pad_token_id).long())


def test_eighty_ten_ten(pieces):
    batch = _batch(pieces)
    masked = batch["decoder_labels"] != IGNORED
    seen, right = batch["decoder_input_ids"][masked], batch["decoder_labels"][masked]
    hidden, kept = seen == pieces.mask_token_id, seen == right
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    special = torch.tensor([i for i in pieces.all_special_ids if i != pieces.mask_token_id])
    assert not torch.isin(seen, special).any()
    assert not torch.equal(batch["input_ids"], batch["decoder_input_ids"])


def test_masks_depend_on_seed_process_epoch_and_batch(tokenizer):
    first = _batch(tokenizer, seed=1)
    assert all(torch.equal(first[key], value) for key, value in _batch(tokenizer, seed=1).items())
    collator = MaskingCollator(tokenizer, 64, seed=1)
    collator.epoch = 1
    other_epoch = collator([{"text": text} for text in TEXTS])
    moved = MaskingCollator(tokenizer, 64, seed=1)([{"text": text, "position": 7} for text in TEXTS])
    for other in (_batch(tokenizer, seed=2), _batch(tokenizer, seed=1, process_index=1), other_epoch, moved):
        assert not torch.equal(first["labels"], other["labels"])
        assert not torch.equal(first["decoder_input_ids"], other["decoder_input_ids"])


def test_long_texts_are_cropped_at_random_positions(tokenizer):
    text = " ".join(SENTENCES)
    whole = tokenize_words(tokenizer, [text])[0]["input_ids"]
    collator, seen = MaskingCollator(tokenizer, 16), set()
    for epoch in range(60):
        collator.epoch = epoch
        batch = collator([{"text": text}])
        assert batch["input_ids"].shape == (1, 16)
        assert batch["input_ids"][0, [0, -1]].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]
        tokens = torch.where(batch["decoder_labels"] != IGNORED, batch["decoder_labels"], batch["decoder_input_ids"])
        row = tokens[0, 1:-1].tolist()
        starts = [i for i in range(len(whole) - 13) if whole[i : i + 14] == row]
        assert starts, "a crop is a contiguous part of the text"
        seen.update(starts)
    assert min(seen) < 10
    assert max(seen) > len(whole) - 24
    assert len(seen) > 25


def test_masks_equal_a_loop_on_counts():
    """In each text, floor or ceil of rate * words words are masked, independent of the other texts."""
    rng = np.random.default_rng(0)
    words = np.full((50, 30), -1)
    for row in range(50):
        count = rng.integers(1, 12)
        words[row, 1 : 1 + 2 * count] = np.repeat(np.arange(count), 2)
    for mask, rate in zip(WholeWordMasks(0.2, 0.4)(words, rng), (0.2, 0.4), strict=True):
        for row in range(50):
            count = words[row].max() + 1
            assert mask[row].sum() / 2 in (np.floor(rate * count), np.floor(rate * count) + 1)


def test_wrong_tokenizers_are_refused(tokenizer):
    import copy

    silent = copy.deepcopy(tokenizer)
    silent.mask_token = None
    with pytest.raises(ValueError, match=r"tokenizer: .* has no mask token"):
        MaskingCollator(silent, 16)
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="puts no special token first"):
        MaskingCollator(bare, 16)
