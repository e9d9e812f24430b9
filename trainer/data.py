"""Training tables: reading, checking, splitting, and collating their texts into one batch of rows."""

import random
import re
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_2dmse.encoding import check_texts as as_texts

from .shared.tables import check_texts, draw_rows

# Numbered negatives may be empty: not every row has as many.
# The column of texts without labels that `add_unlabeled_texts` puts behind the others.
UNLABELED = "unlabeled"


ACCEPTED = "(anchor, positive[, negative, negative_1, ...]) or (sentence1, sentence2, score)"


def check_table(table: Dataset, argument: str = "train_file") -> Dataset:
    """Check columns and values of a training or evaluation table.

    Returns:
        the table with its columns in the order of their roles; ValueError naming column and row otherwise.
    """
    names = _ordered_columns(table.column_names, argument)
    table = table.select_columns(names)
    for name in names:
        if name == "score":
            table = _check_scores(table, argument)
        else:
            check_texts(table, name, argument, optional=name.startswith("negative_"))
    return table


def join_tables(tables: Sequence[Dataset]) -> Dataset:
    """Checked tables one behind the other; ValueError if some have scores and others anchors.

    Where one table has fewer columns of negatives than another, its rows have no text there.
    """
    if len(tables) == 1:
        return tables[0]
    if len({"score" in table.column_names for table in tables}) == 2:
        raise ValueError("train_file: files with scores and files with anchors cannot be trained together")
    names = max((table.column_names for table in tables), key=len)
    return datasets.concatenate_datasets(list(tables)).select_columns(names)


def text_columns(table: Dataset) -> list[str]:
    """The columns that hold texts, in the order of their roles."""
    return [name for name in table.column_names if name != "score"]


def rescale_scores(table: Dataset, highest: float | None = None) -> tuple[Dataset, float]:
    """Scores divided by their highest (0 to 5 becomes 0 to 1), which cosine_mse needs, and that highest score."""
    scores = np.asarray(table["score"], dtype=np.float64)
    if scores.min() < 0:
        raise ValueError("loss: cosine_mse needs scores from 0 up; the score column holds negative ones")
    highest = max(1.0, float(scores.max())) if highest is None else highest
    return table.remove_columns("score").add_column("score", (scores / highest).tolist()), highest


def draw_texts(tables: Sequence[Dataset], seed: int, limit: int = 10_000) -> list[str]:
    """At most `limit` different texts of the tables' columns, drawn by the seed."""
    tables = [draw_rows(table, limit, seed) for table in tables]
    texts = dict.fromkeys(text for table in tables for name in text_columns(table) for text in table[name] if text)
    return random.Random(seed).sample(list(texts), min(limit, len(texts)))


def add_unlabeled_texts(table: Dataset, texts: Sequence[str], seed: int, batch: int) -> Dataset:
    """The table with a column `unlabeled`: one of the texts for each row, in an order drawn by the seed, over and over.

    ValueError where they are fewer than a batch, in which texts would then stand twice, or not all texts.
    """
    texts, _ = as_texts(texts)
    if len(texts) < batch:
        raise ValueError(f"unlabeled_texts: {len(texts)} are fewer than one batch of {batch}; add some")
    empty = next((number for number, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise ValueError(f"unlabeled_texts: item {empty} is empty; remove it")
    order = np.random.default_rng(seed).permutation(len(texts))
    return table.add_column(UNLABELED, [texts[order[i % len(texts)]] for i in range(len(table))])


def texts_to_fit(tables: Sequence[Dataset], joined: Dataset, seed: int) -> list[str]:
    """What new projections are fitted to: texts of all tables, and those without labels that `joined` may hold."""
    unlabeled = [joined.select_columns([UNLABELED])] if UNLABELED in joined.column_names else []
    return draw_texts([*tables, *unlabeled], seed)


class PairCollator:
    """Turns examples into ONE batch of rows, column after column, padded on the right.

    Args:
        tokenizer: of the model.
        columns: the text columns in the order of their roles; `unlabeled`, the last one, where there are texts without
            labels.
        max_length: in tokens.

    Returns (per call): `input_ids`, `attention_mask` (rows, length), `lengths` (tokens of each row), `counts` (rows of
    each column; a row without a text in a column of negatives adds none), `unlabeled` (rows of texts without labels behind
    these) where the examples hold such, and `scores` (B,) where they carry a score.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], max_length: int):
        self.tokenizer = tokenizer
        self.columns = list(columns)
        self.max_length = max_length

    def __call__(self, examples: list[dict]) -> dict:
        columns = [[example[column] for example in examples if example[column]] for column in self.columns]
        texts = [text for column in columns for text in column]
        batch = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=True, padding_side="right", return_tensors="pt"
        )
        known = ("input_ids", "attention_mask", "token_type_ids")
        output = {key: batch[key] for key in known if key in batch}
        output["lengths"] = batch["attention_mask"].sum(dim=1).tolist()
        counts = list(map(len, columns))
        if UNLABELED in self.columns:
            output["unlabeled"] = counts.pop()
        output["counts"] = tuple(counts)
        if "score" in examples[0]:
            output["scores"] = torch.tensor([example["score"] for example in examples], dtype=torch.float32)
        return output


def _ordered_columns(names: Sequence[str], argument: str) -> list[str]:
    if set(names) == {"sentence1", "sentence2", "score"}:
        return ["sentence1", "sentence2", "score"]
    negatives = [name for name in names if re.fullmatch(r"negative(_\d+)?", name)]
    if set(names) == {"anchor", "positive", *negatives}:
        return ["anchor", "positive", *sorted(negatives, key=lambda name: int(name[9:] or 0))]
    raise ValueError(f"{argument}: the columns ({', '.join(names)}) are not one of the accepted sets: {ACCEPTED}")


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
