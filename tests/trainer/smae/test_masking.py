"""Whole-word masks: their rates, tokens that are never masked, and reproducibility."""

import zlib

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from modeling_2dmse.modeling_smae import StarbucksForMaskedAutoencoding, find_masked
from modeling_2dmse.tokens import tokenize_words
from trainer.smae.masking import IGNORED, MaskingCollator, WholeWordMasks, special_tokens_around

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
    whole = tokenize_words(tokenizer, [text])[0].ids.tolist()
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


def test_words_are_those_of_the_tokenizer(pieces):
    tokens, words = tokenize_words(pieces, [*TEXTS[:20], "", "one <mask> two"])
    encoded = pieces([*TEXTS[:20], "", "one <mask> two"], add_special_tokens=False)
    assert [row.tolist() for row in np.split(tokens.ids, tokens.starts[1:-1])] == encoded["input_ids"]
    expected = [-1 if word is None else word for row in range(22) for word in encoded.word_ids(row)]
    assert words.tolist() == expected


def row_by_row(tokenizer, rows, max_length, seed):
    """Tokens, word numbers and attention of a batch, made one row after another."""
    before, after = special_tokens_around(tokenizer)
    room, special = max_length - len(before) - len(after), set(tokenizer.all_special_ids)
    ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
    rng = np.random.default_rng([seed, 0, 0, 0, zlib.crc32(ids.tobytes())])
    cut = []
    for row in rows:
        longer = len(row["input_ids"]) > room
        first = int(rng.integers(len(row["input_ids"]) - room + 1)) if longer else 0
        cut.append([row[name][first : first + room] for name in ("input_ids", "words")])
    width = max(len(ids) for ids, _ in cut) + len(before) + len(after)
    width = min(width + -width % 8, max_length)
    lines = {"tokens": [], "words": [], "attention": []}
    for ids, words in cut:
        whole = [*before, *ids, *after]
        numbers = [-1 if token in special else word for token, word in zip(ids, words, strict=True)]
        padding = width - len(whole)
        lines["tokens"].append([*whole, *[tokenizer.pad_token_id] * padding])
        lines["words"].append([*[-1] * len(before), *numbers, *[-1] * (len(after) + padding)])
        lines["attention"].append([1] * len(whole) + [0] * padding)
    return lines, rng


@pytest.mark.parametrize("arrays", [False, True])
def test_a_batch_is_that_of_its_rows_one_by_one(pieces, arrays):
    encoded = pieces([*TEXTS[:30], *SENTENCES, "one <mask> two"], add_special_tokens=False)
    rows = [
        {"input_ids": ids, "words": [-1 if word is None else word for word in encoded.word_ids(row)]}
        for row, ids in enumerate(encoded["input_ids"])
    ]
    assert min(map(len, encoded["input_ids"])) < 20 < max(map(len, encoded["input_ids"])), "some are cropped"
    expected, rng = row_by_row(pieces, rows, 20, seed=3)
    given = [{name: np.array(values) for name, values in row.items()} for row in rows] if arrays else rows
    batch = MaskingCollator(pieces, 20, seed=3)(given)
    assert batch["attention_mask"].tolist() == expected["attention"]
    whole = torch.where(batch["decoder_labels"] != IGNORED, batch["decoder_labels"], batch["decoder_input_ids"])
    assert whole.tolist() == expected["tokens"]
    rng.integers(2**63)
    masks = WholeWordMasks(0.2, 0.4)(np.array(expected["words"]), rng)
    assert np.array_equal(masks[0], (batch["labels"] != IGNORED).numpy())
    assert np.array_equal(masks[1], (batch["decoder_labels"] != IGNORED).numpy())


class Searches(TorchDispatchMode):
    """Counts searches for values that are not zero: their number is unknown until a GPU has finished."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_search_the_masked_tokens(tokenizer, backbone_path):
    model = StarbucksForMaskedAutoencoding.from_backbone(backbone_path("bert"), sizes=["1x8", "2x32"]).eval()
    batch = MaskingCollator(tokenizer, 32)([{"text": text} for text in SENTENCES])
    assert torch.equal(batch["masked"], find_masked(batch["labels"]))
    assert torch.equal(batch["decoder_masked"], find_masked(batch["decoder_labels"]))
    with Searches() as searches:
        loss = model(**batch).loss
        loss.backward()
    assert searches.count == 0
    with Searches() as searches:
        found = model(**{name: value for name, value in batch.items() if "masked" not in name}).loss
    assert searches.count == 2
    assert torch.equal(loss, found)
