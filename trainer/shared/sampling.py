"""The order in which the rows of one or several training tables come, block by block.

A block contains the rows that all processes together take in one step. The samplers here yield rows, not batches, which
suits accelerate: it distributes consecutive batches of the order to the processes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from .callbacks import SetEpoch
from .mixin import TrainerMixin
from .tables import text_columns

# Blocks whose rows are sorted by length together: enough for similar lengths, few enough to stay random.
_BLOCKS_SORTED_TOGETHER = 50


class BlockSampler(Sampler[int]):
    """Yields row numbers, so that consecutive rows form the blocks.

    Args:
        tables: the text columns of each source; row numbers continue from one source to the next.
        block_size: rows per step, of all processes together.
        kind: `random`; `no_duplicates`: no text appears in two rows of a block; `group_by_length`: the rows of a block
            have similar lengths.
        mixing: with several sources, each block comes from one of them. `proportional`: each source gives all of its
            blocks, in random order; `round_robin`: one block of each source in turn, until a source has no more.
        seed: seed of the run.
        keep_last: keep the last block of a single source, which may be smaller. With several sources, all blocks are
            full.

    Raises:
        ValueError: a text appears in more rows than there are blocks, which makes `no_duplicates` impossible, or a
            source has no full block.
    """

    def __init__(
        self,
        tables: Sequence[Dataset],
        block_size: int,
        kind: str = "random",
        mixing: str = "proportional",
        seed: int = 0,
        keep_last: bool = True,
    ):
        self.block_size = block_size
        self.kind = kind
        self.mixing = mixing
        self.seed = seed
        self.keep_last = keep_last and len(tables) == 1
        self.epoch = 0
        self.offsets = np.cumsum([0, *map(len, tables)])[:-1]
        self.sizes = [len(table) for table in tables]
        small = [index for index, size in enumerate(self.sizes) if size < block_size]
        if small and not self.keep_last:
            raise ValueError(
                f"train_file: source {small[0] + 1} has {self.sizes[small[0]]} rows, but a step takes {block_size}"
            )
        self.texts = [number_texts(table) for table in tables] if kind == "no_duplicates" else None
        self.lengths = [text_lengths(table) for table in tables] if kind == "group_by_length" else None
        for texts in self.texts or []:  # if no order can be found, fail now rather than in a later epoch
            if self.keep_last:
                check_duplicates(texts, block_size)
            blocks_without_duplicates(texts, block_size, np.random.default_rng(seed), self.keep_last)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; each has another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sizes[0] if self.keep_last else sum(self._counts()) * self.block_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = [self._blocks(source, rng) for source in range(len(self.sizes))]
        yield from np.concatenate([blocks[source].pop(0) for source in self._turns(rng)]).tolist()

    def _counts(self) -> list[int]:
        """Blocks per epoch of each source."""
        counts = [-(-size // self.block_size) if self.keep_last else size // self.block_size for size in self.sizes]
        return [min(counts)] * len(counts) if self.mixing == "round_robin" else counts

    def _turns(self, rng: np.random.Generator) -> np.ndarray:
        """The source of each block."""
        counts = self._counts()
        if self.mixing == "round_robin":
            return np.tile(np.arange(len(counts)), counts[0])
        return rng.permutation(np.repeat(np.arange(len(counts)), counts))

    def _blocks(self, source: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The rows of one source in blocks; a smaller block comes last, or is left out."""
        size, block = self.sizes[source], self.block_size
        if self.texts is not None:
            blocks = blocks_without_duplicates(self.texts[source], block, rng, self.keep_last)
        else:
            order = rng.permutation(size)
            if self.lengths is not None:
                order = sort_within(order, self.lengths[source], block * _BLOCKS_SORTED_TOGETHER)
            full = size - size % block
            blocks = [order[start : start + block] for start in range(0, full, block)]
            blocks = [blocks[index] for index in rng.permutation(len(blocks))]
            if self.keep_last and full < size:
                blocks.append(order[full:])
        return [rows + self.offsets[source] for rows in blocks]


class ResumableOrderMixin(TrainerMixin):
    """Goes before `Trainer`: several processes that resume in a later epoch get the same order of rows as before.

    With accelerate's usual sampler they would not.
    """

    def _get_train_sampler(self, train_dataset=None):
        world = self.args.world_size
        if world == 1 or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        sampler = BlockSampler([self.train_dataset], self.args.train_batch_size * world, seed=self.args.seed)
        self.add_callback(SetEpoch(sampler))
        return sampler


def number_texts(table: Dataset) -> list[np.ndarray]:
    """For each row, the numbers of its texts: equal texts have the same number, in any column."""
    columns = [table[name] for name in text_columns(table)]
    numbers: dict[str, int] = {}
    return [
        np.unique([numbers.setdefault(text, len(numbers)) for text in row if text])
        for row in zip(*columns, strict=True)
    ]


def text_lengths(table: Dataset) -> np.ndarray:
    """The length of the longest text of each row, in characters."""
    columns = [table[name] for name in text_columns(table)]
    return np.max([[len(text or "") for text in column] for column in columns], axis=0)


def sort_within(order: np.ndarray, lengths: np.ndarray, group: int) -> np.ndarray:
    """The order, with each group of `group` consecutive rows sorted by length, longest first."""
    parts = [order[start : start + group] for start in range(0, len(order), group)]
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])


def check_duplicates(texts: list[np.ndarray], block_size: int) -> None:
    """ValueError if a text appears in more rows than there are blocks, so that one block must have two of them."""
    blocks = -(-len(texts) // block_size)
    most = int(np.bincount(np.concatenate(texts)).max())
    if most > blocks:
        raise ValueError(
            f"batch_sampler: no_duplicates is impossible: one text appears in {most} rows, but there are {blocks} "
            f"batches of {block_size}; lower the batch size or remove some of these rows"
        )


def blocks_without_duplicates(
    texts: list[np.ndarray], block_size: int, rng: np.random.Generator, keep_last: bool
) -> list[np.ndarray]:
    """Distribute rows over blocks so that no text appears in two rows of a block.

    Rows with the most frequent texts are placed first. Starting from a random block, each takes the first block that
    has room and has none of its texts. Rows that share no text with others fill the remaining places.
    """
    for _ in range(10):
        blocks = _place(texts, block_size, rng, keep_last)
        if blocks is not None:
            return blocks
    raise ValueError(
        f"batch_sampler: no order without duplicates was found for batches of {block_size}; lower the batch size"
    )


def _place(texts, block_size, rng, keep_last) -> list[np.ndarray] | None:
    frequency = np.bincount(np.concatenate(texts))
    highest = np.array([frequency[row].max() for row in texts])
    order = rng.permutation(len(texts))
    order = order[np.argsort(-highest[order], kind="stable")]
    full = len(texts) // block_size
    rooms = [block_size] * full + ([len(texts) % block_size] if keep_last and len(texts) % block_size else [])
    rows: list[list[int]] = [[] for _ in rooms]
    seen: list[set[int]] = [set() for _ in rooms]
    open_blocks = list(rng.permutation(len(rooms)))
    for row in order:
        if not open_blocks:
            break  # the remaining rows would start a smaller block, which is not kept
        wanted = texts[row].tolist()
        start = int(rng.integers(len(open_blocks)))
        for step in range(len(open_blocks)):
            place = (start + step) % len(open_blocks)
            block = open_blocks[place]
            if seen[block].isdisjoint(wanted):
                break
        else:
            if keep_last:
                return None
            continue
        rows[block].append(row)
        seen[block].update(wanted)
        if len(rows[block]) == rooms[block]:
            open_blocks[place] = open_blocks[-1]
            open_blocks.pop()
    if open_blocks:
        return None
    return [rng.permutation(block) for block in rows]
