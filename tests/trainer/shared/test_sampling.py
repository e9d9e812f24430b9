"""The order of rows: no row is lost, no duplicates in a block, one source per block, reproducible."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from trainer.choices import BATCH_SAMPLERS
from trainer.shared.sampling import BlockSampler, ResumableOrderMixin


def _table(rows: int, name: str = "", repeat: int = 3) -> Dataset:
    """Each anchor appears in `repeat` rows, and every fifth negative is the anchor of another row."""
    return Dataset.from_dict(
        {
            "anchor": [f"anchor {name} {row // repeat}" for row in range(rows)],
            "positive": [f"positive {name} {row}" + " long" * (row * 7 % 11) for row in range(rows)],
            "negative": [f"anchor {name} {row // 6}" if row % 5 == 0 else f"negative {row}" for row in range(rows)],
            "negative_1": [None if row % 2 else f"other {row}" for row in range(rows)],
        }
    )


def _blocks(sampler: BlockSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    return [order[start : start + sampler.block_size] for start in range(0, len(order), sampler.block_size)]


@pytest.mark.parametrize("kind", BATCH_SAMPLERS)
@pytest.mark.parametrize("rows", [60, 67])
def test_every_row_comes_once_per_epoch_in_a_new_order(kind, rows):
    sampler = BlockSampler([_table(rows)], 10, kind, seed=1)
    first, second = _blocks(sampler, 0), _blocks(sampler, 1)
    for blocks in (first, second):
        assert sorted(row for block in blocks for row in block) == list(range(rows))
    assert first != second
    assert _blocks(BlockSampler([_table(rows)], 10, kind, seed=1), 1) == second
    assert _blocks(BlockSampler([_table(rows)], 10, kind, seed=2), 1) != second


@pytest.mark.parametrize("block", [2, 7, 20])
@pytest.mark.parametrize("keep_last", [True, False])
def test_no_text_appears_in_two_rows_of_a_block(block, keep_last):
    table = _table(100)
    sampler = BlockSampler([table], block, "no_duplicates", keep_last=keep_last)
    blocks = _blocks(sampler)
    assert len(blocks) == (-(-100 // block) if keep_last else 100 // block)
    met = 0
    for rows in blocks:
        texts = [{text for text in table[row].values() if text} for row in rows]
        assert len(set().union(*texts)) == sum(map(len, texts))
    for rows in _blocks(BlockSampler([table], block, "random")):
        texts = [{text for text in table[row].values() if text} for row in rows]
        met += len(set().union(*texts)) < sum(map(len, texts))
    assert met, "at random, some blocks have duplicates"


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"one text appears in \d+ rows, but there are 6 batches of 10"):
        BlockSampler([_table(60, repeat=30)], 10, "no_duplicates")
    with pytest.raises(ValueError, match="no order without duplicates was found for batches of 10"):
        BlockSampler([_table(60, repeat=30)], 10, "no_duplicates", keep_last=False)
    with pytest.raises(ValueError, match="train_file: source 2 has 5 rows, but a step takes 10"):
        BlockSampler([_table(60), _table(5)], 10)


def test_blocks_of_similar_length():
    table = _table(400)
    longest = np.array([max(len(text or "") for text in row.values()) for row in table])
    spread = {
        kind: np.mean([np.ptp(longest[rows]) for rows in _blocks(BlockSampler([table], 8, kind))])
        for kind in ("random", "group_by_length")
    }
    assert spread["group_by_length"] < 0.3 * spread["random"]


@pytest.mark.parametrize("kind", BATCH_SAMPLERS)
def test_each_block_comes_from_one_source(kind):
    tables = [_table(65, "a"), _table(30, "b", repeat=1)]
    for mixing, counts in (("proportional", (6, 3)), ("round_robin", (3, 3))):
        sampler = BlockSampler(tables, 10, kind, mixing)
        blocks = _blocks(sampler)
        sources = [{int(row >= 65) for row in rows} for rows in blocks]
        assert all(len(source) == 1 for source in sources)
        turns = [source.pop() for source in sources]
        assert (turns.count(0), turns.count(1)) == counts
        assert len({row for rows in blocks for row in rows}) == 10 * sum(counts)
        assert (turns == [0, 1] * 3) == (mixing == "round_robin")


@pytest.mark.parametrize(("world", "strategy"), [(1, "random"), (2, "sequential"), (2, "random")])
def test_several_processes_resume_their_order(world, strategy):
    """If several processes share a random order, a resumed epoch must have the same order as before."""

    class Plain:
        def _get_train_sampler(self, train_dataset=None):
            return "usual"

        def add_callback(self, callback):
            self.callback = callback

    class Ordered(ResumableOrderMixin, Plain):
        args = SimpleNamespace(world_size=world, train_sampling_strategy=strategy, train_batch_size=2, seed=3)
        train_dataset = list(range(8))

    trainer = Ordered()
    sampler = trainer._get_train_sampler()
    if (world, strategy) != (2, "random"):
        assert sampler == "usual"
        return
    first = list(sampler)
    trainer.callback.on_epoch_begin(None, SimpleNamespace(epoch=5.0), None)
    again = Ordered()
    resumed = again._get_train_sampler()
    again.callback.on_epoch_begin(None, SimpleNamespace(epoch=5.0), None)
    assert list(sampler) == list(resumed) != first
    assert sorted(resumed) == sorted(first) == list(range(8))
