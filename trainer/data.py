"""Training tables: checking them, joining them, and collating their texts into one batch of rows."""

import os
import random
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from modeling_2dmse.batching import check_texts as as_texts
from modeling_2dmse.tokens import Tokens, from_rows, tokenize

from .shared.columns import name_columns
from .shared.tables import check_texts, draw_rows, skip_rows

# The column of texts without labels, which `add_unlabeled_texts` adds after the others.
UNLABELED = "unlabeled"


def check_table(
    table: Dataset, argument: str = "train_file", columns: Sequence[str] | None = None, skip_invalid: bool = False
) -> Dataset:
    """Check the columns and values of a training or evaluation table.

    Args:
        table: the table.
        argument: the name that errors give to the table.
        columns: roles of columns that are not found by name, as `name:role`, for example `query:anchor`.
        skip_invalid: leave out rows with an empty text or a score that is not a number, and say how many.

    Returns:
        the table with its columns named and ordered by their roles.

    Raises:
        ValueError: columns or values are not as they should be; the message names the column and the row.
    """
    table = name_columns(table, columns, argument)
    names = _ordered_columns(table.column_names)
    table = table.select_columns(names)
    if skip_invalid:
        table = skip_rows(table, [name for name in names if not name.startswith("negative_")], argument)
    for name in names:
        if name == "score":
            table = _check_scores(table, argument)
        else:  # numbered negatives may be empty: rows may have different numbers of negatives
            check_texts(table, name, argument, optional=name.startswith("negative_"))
    return table


def join_tables(tables: Sequence[Dataset]) -> Dataset:
    """Concatenate checked tables.

    Rows of a table with fewer columns of negatives than another table have no text in the missing columns.

    Raises:
        ValueError: some tables have scores and others have anchors.
    """
    if len(tables) == 1:
        return tables[0]
    if len({"score" in table.column_names for table in tables}) == 2:
        raise ValueError("train_file: files with scores and files with anchors cannot be trained together")
    names = max((table.column_names for table in tables), key=len)
    return datasets.concatenate_datasets(list(tables)).select_columns(names)


def text_columns(table: Dataset) -> list[str]:
    """The columns that contain texts, in the order of their roles."""
    return [name for name in table.column_names if name != "score"]


def rescale_scores(table: Dataset, highest: float | None = None) -> tuple[Dataset, float]:
    """Divide scores by the highest score (0 to 5 becomes 0 to 1), as cosine_mse requires.

    Args:
        table: a table with scores.
        highest: divide by this value; by default the highest score of the table, but at least 1.

    Returns:
        the table, and the divisor.

    Raises:
        ValueError: a score is negative.
    """
    scores = np.asarray(table["score"], dtype=np.float64)
    if scores.min() < 0:
        raise ValueError("loss: cosine_mse needs scores of at least 0; the column score has negative values")
    highest = max(1.0, float(scores.max())) if highest is None else highest
    return table.remove_columns("score").add_column("score", (scores / highest).tolist()), highest


def draw_texts(tables: Sequence[Dataset], seed: int, limit: int = 10_000) -> list[str]:
    """At most `limit` different texts from the tables, drawn at random."""
    tables = [draw_rows(table, limit, seed) for table in tables]
    texts = dict.fromkeys(text for table in tables for name in text_columns(table) for text in table[name] if text)
    return random.Random(seed).sample(list(texts), min(limit, len(texts)))


def add_unlabeled_texts(table: Dataset, texts: Sequence[str], seed: int, batch: int) -> Dataset:
    """Add a column `unlabeled` to a table, with one of the texts for each row.

    Args:
        table: the training table.
        texts: the texts. They come in a random order, which is repeated if there are fewer texts than rows.
        seed: seed of the order.
        batch: rows per batch.

    Returns:
        the table with the column.

    Raises:
        ValueError: there are fewer texts than rows in a batch, so that a batch would have one twice; or an item is
            empty or not a string.
    """
    texts, _ = as_texts(texts)
    if len(texts) < batch:
        raise ValueError(f"unlabeled_texts: there are {len(texts)}, fewer than the {batch} of one batch; add more")
    empty = next((number for number, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise ValueError(f"unlabeled_texts: item {empty} is empty; remove it")
    order = np.random.default_rng(seed).permutation(len(texts))
    return table.add_column(UNLABELED, [texts[order[i % len(texts)]] for i in range(len(table))])


def texts_to_fit(tables: Sequence[Dataset], joined: Dataset, seed: int) -> list[str]:
    """The texts that new projections are fitted to: those of all tables, and the texts without labels in `joined`."""
    unlabeled = [joined.select_columns([UNLABELED])] if UNLABELED in joined.column_names else []
    return draw_texts([*tables, *unlabeled], seed)


class PairCollator:
    """Turns examples into ONE batch of rows, column after column, padded on the right.

    A batch contains:

    - `input_ids` and `attention_mask`, (rows, length), or `input_ids` alone, (1, tokens), if `packed`; `token_type_ids`
      if they are not all 0;
    - `lengths`: tokens of each row;
    - `counts`: rows of each column; an example without a text in a column of negatives adds none;
    - `unlabeled`: number of rows of texts without labels, after the others, if the examples have any;
    - `scores`, (B,), if the examples have a score.

    Args:
        tokenizer: the model's tokenizer.
        columns: the text columns in the order of their roles. If there are texts without labels, `unlabeled` is the
            last.
        max_length: maximum length of a text in tokens.
        packed: put all rows into one row without padding.
        remember: keep the tokens of every text, for tables that are read more than once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Sequence[str],
        max_length: int,
        packed: bool = False,
        remember: bool = False,
    ):
        self.tokenizer = tokenizer
        self.columns = list(columns)
        self.max_length = max_length
        self.packed = packed
        self._known: dict[str, np.ndarray] | None = {} if remember else None

    def __call__(self, examples: list[dict]) -> dict:
        columns = [[example[column] for example in examples if example[column]] for column in self.columns]
        texts = [text for column in columns for text in column]
        tokens = self._tokenize(texts)
        output: dict = tokens.packed() if self.packed else tokens.padded()
        output.pop("packing", None)  # made again on the device of the model
        output["lengths"] = tokens.lengths.tolist()
        counts = list(map(len, columns))
        if UNLABELED in self.columns:
            output["unlabeled"] = counts.pop()
        output["counts"] = tuple(counts)
        if "score" in examples[0]:
            output["scores"] = torch.tensor([example["score"] for example in examples], dtype=torch.float32)
        return output

    def _tokenize(self, texts: list[str]) -> Tokens:
        if get_worker_info() is not None:  # a forked process does not have the tokenizer's threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._known is None:
            return tokenize(self.tokenizer, texts, self.max_length)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            tokens = tokenize(self.tokenizer, new, self.max_length)
            if tokens.type_ids is not None:  # only ids are kept
                self._known = None
                return tokenize(self.tokenizer, texts, self.max_length)
            self._known.update(zip(new, np.split(tokens.ids, tokens.starts[1:-1]), strict=True))
        return from_rows([self._known[text] for text in texts], self.tokenizer.pad_token_id or 0)


def _ordered_columns(names: Sequence[str]) -> list[str]:
    if "score" in names:
        return ["sentence1", "sentence2", "score"]
    negatives = [name for name in names if name.startswith("negative")]
    return ["anchor", "positive", *sorted(negatives, key=lambda name: int(name[9:] or 0))]


def _check_scores(table: Dataset, argument: str) -> Dataset:
    column = table.with_format("arrow")[:]["score"]
    try:
        scores = pc.cast(column, "float64").to_numpy(zero_copy_only=False)
    except (ValueError, NotImplementedError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{argument}: column score must hold numbers: {str(error).splitlines()[0]}") from error
    broken = np.flatnonzero(~np.isfinite(scores))
    if len(broken):
        raise ValueError(
            f"{argument}: column score holds {len(broken)} values that are not finite numbers, "
            f"the first in row {broken[0] + 1}"
        )
    return table.remove_columns("score").add_column("score", scores.tolist())
