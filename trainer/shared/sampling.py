"""In which order the rows of one or several training tables come, block by block.

A block is what all processes together take in one step. A sampler of rows, rather than of batches, suits accelerate:
it shares out the order's consecutive batches to the processes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainingArguments

from .callbacks import TellEpoch

BATCH_SAMPLERS = ("random", "no_duplicates", "group_by_length")
MIXINGS = ("proportional", "round_robin")
# Blocks whose rows are sorted by length together: enough for even lengths, few enough to stay random.
_BLOCKS_SORTED_TOGETHER = 50


class BlockSampler(Sampler[int]):
    """
    Args:
        tables: the columns of texts of each source, as `datasets.Dataset`; rows are numbered through all of them.
        block_size: rows a step, of all processes together.
        kind: `random`; `no_duplicates`: no text stands in two rows of a block; `group_by_length`: rows of a block are
            of similar length.
        mixing: with several sources each block comes from one; `proportional`: as many blocks as it has, in random
            order; `round_robin`: one of each in turn, until the first has no more.
        seed: of the run.
        keep_last: keep the last block of a single source, which may be smaller. Of several, only full blocks come.

    Raises:
        ValueError: `no_duplicates` is impossible because a text stands in more rows than there are blocks, or a source
            has no full block.
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
                f"train_file: source {small[0] + 1} has {self.sizes[small[0]]} rows, fewer than {block_size}, a step's"
            )
        self.texts = [number_texts(table) for table in tables] if kind == "no_duplicates" else None
        self.lengths = [text_lengths(table) for table in tables] if kind == "group_by_length" else None
        for texts in self.texts or []:  # an order that cannot be found must not stop a later epoch
            if self.keep_last:
                check_duplicates(texts, block_size)
            blocks_without_duplicates(texts, block_size, np.random.default_rng(seed), self.keep_last)

    def set_epoch(self, epoch: int) -> None:
        """Rows come in another order in each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sizes[0] if self.keep_last else sum(self._counts()) * self.block_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = [self._blocks(source, rng) for source in range(len(self.sizes))]
        yield from np.concatenate([blocks[source].pop(0) for source in self._turns(rng)]).tolist()

    def _counts(self) -> list[int]:
        """Blocks of each source that come in an epoch."""
        counts = [-(-size // self.block_size) if self.keep_last else size // self.block_size for size in self.sizes]
        return [min(counts)] * len(counts) if self.mixing == "round_robin" else counts

    def _turns(self, rng: np.random.Generator) -> np.ndarray:
        """The source of each block."""
        counts = self._counts()
        if self.mixing == "round_robin":
            return np.tile(np.arange(len(counts)), counts[0])
        return rng.permutation(np.repeat(np.arange(len(counts)), counts))

    def _blocks(self, source: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The rows of one source in blocks; a smaller one stands last, or is left out."""
        size, block = self.sizes[source], self.block_size
        if self.kind == "no_duplicates":
            blocks = blocks_without_duplicates(self.texts[source], block, rng, self.keep_last)
        else:
            order = rng.permutation(size)
            if self.kind == "group_by_length":
                order = sort_within(order, self.lengths[source], block * _BLOCKS_SORTED_TOGETHER)
            full = size - size % block
            blocks = [order[start : start + block] for start in range(0, full, block)]
            blocks = [blocks[index] for index in rng.permutation(len(blocks))]
            if self.keep_last and full < size:
                blocks.append(order[full:])
        return [rows + self.offsets[source] for rows in blocks]


def make_block_sampler(tables: Sequence[Dataset], args: TrainingArguments) -> BlockSampler | None:
    """Our own order of the rows by a [`TwoDMSETrainingArguments`], None where the Trainer's does."""
    world = args.world_size
    plain = args.batch_sampler == "random" and len(tables) == 1
    if not tables or (plain and (world == 1 or args.train_sampling_strategy == "sequential")):
        return None
    # With several processes accelerate fills up the last batches with rows from the start.
    keep_last = not args.dataloader_drop_last and (world == 1 or args.batch_sampler != "no_duplicates")
    return BlockSampler(
        tables, args.train_batch_size * world, args.batch_sampler, args.mixing, args.seed, keep_last=keep_last
    )


class ResumableOrderMixin:
    """Before `Trainer`: several processes find their order of the rows again when they resume in a later epoch.

    The usual sampler under accelerate does not.
    """

    def _get_train_sampler(self, train_dataset=None):
        world = self.args.world_size
        if world == 1 or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        sampler = BlockSampler([self.train_dataset], self.args.train_batch_size * world, seed=self.args.seed)
        self.add_callback(TellEpoch(sampler))
        return sampler


def number_texts(table: Dataset) -> list[np.ndarray]:
    """For each row, the numbers of its texts: equal texts, in whatever column, have one number."""
    columns = [table[name] for name in table.column_names if name != "score"]
    numbers: dict[str, int] = {}
    return [
        np.unique([numbers.setdefault(text, len(numbers)) for text in row if text])
        for row in zip(*columns, strict=True)
    ]


def text_lengths(table: Dataset) -> np.ndarray:
    """Characters of each row's longest text."""
    columns = [table[name] for name in table.column_names if name != "score"]
    return np.max([[len(text or "") for text in column] for column in columns], axis=0)


def sort_within(order: np.ndarray, lengths: np.ndarray, group: int) -> np.ndarray:
    """Rows sorted by length within each `group` consecutive rows of the order, longest first."""
    parts = [order[start : start + group] for start in range(0, len(order), group)]
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])


def check_duplicates(texts: list[np.ndarray], block_size: int) -> None:
    """ValueError if a text stands in more rows than there are blocks, so that two of them must meet."""
    blocks = -(-len(texts) // block_size)
    most = int(np.bincount(np.concatenate(texts)).max())
    if most > blocks:
        raise ValueError(
            f"batch_sampler: no_duplicates is impossible: one text stands in {most} rows, but there are {blocks} "
            f"batches of {block_size}; lower the batch size or remove such rows"
        )


def blocks_without_duplicates(
    texts: list[np.ndarray], block_size: int, rng: np.random.Generator, keep_last: bool
) -> list[np.ndarray]:
    """Rows in blocks such that no text stands in two rows of one.

    Rows with the most frequent texts choose first, each the first block with room in which none of its texts stands,
    from a random one onward; so rows that nobody shares a text with fill what is left.
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
    rows, seen = [[] for _ in rooms], [set() for _ in rooms]
    open_blocks = list(rng.permutation(len(rooms)))
    for row in order:
        if not open_blocks:
            break  # what is over would begin a smaller block, which is not kept
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
