"""Training tables: checking them, joining them, and collating their texts into one batch of rows."""

import os
import random
import re
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from modeling_2dmse.batching import check_texts as as_texts
from modeling_2dmse.tokens import Tokens, from_rows, join_tokens, tokenize

from .shared.columns import name_columns
from .shared.roles import TEACHER_SCORE
from .shared.tables import INVALID_ROWS, as_strings, check_texts, draw_rows, refuse_codes, skip_rows, text_columns

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
    table = name_columns(as_strings(table), columns, argument)
    names = _ordered_columns(table.column_names)
    table = table.select_columns(names)
    if skip_invalid:
        table = skip_rows(table, [name for name in names if not name.startswith("negative_")], argument)
    for name in names:
        if name == "score" or name.endswith(TEACHER_SCORE):
            table = _check_scores(table, argument, name)
        else:  # numbered negatives may be empty: rows may have different numbers of negatives
            check_texts(table, name, argument, optional=name.startswith("negative_"))
            refuse_codes(table, name, argument)
    return table


def join_tables(tables: Sequence[Dataset]) -> Dataset:
    """Concatenate checked tables.

    Rows of a table with fewer columns of negatives than another table have no text in the missing columns.

    Raises:
        ValueError: some tables have scores and others have anchors, or not all have a teacher's scores.
    """
    if len(tables) == 1:
        return tables[0]
    if len({"score" in table.column_names for table in tables}) == 2:
        raise ValueError("train_file: files with scores and files with anchors cannot be trained together")
    if len({"positive_score" in table.column_names for table in tables}) == 2:
        raise ValueError("train_file: files with a teacher's scores and files without cannot be trained together")
    names = max((table.column_names for table in tables), key=len)
    # Tables of csv files have large strings; those of others have not.
    tables = [as_strings(table, "large_string") for table in tables]
    return datasets.concatenate_datasets(tables).select_columns(names)


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


def draw_texts(
    tables: Sequence[Dataset], seed: int, limit: int = 10_000, prompts: Mapping[str, str] | None = None
) -> list[str]:
    """At most `limit` different texts from the tables, drawn at random; `prompts` are put before those of a column."""
    tables, before = [draw_rows(table, limit, seed) for table in tables], prompts or {}
    columns = [(before.get(name, ""), table[name]) for table in tables for name in text_columns(table)]
    texts = dict.fromkeys(prompt + text for prompt, column in columns for text in column if text)
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


def texts_to_fit(
    tables: Sequence[Dataset], joined: Dataset, seed: int, prompts: Mapping[str, str] | None = None
) -> list[str]:
    """The texts that new projections are fitted to: those of all tables, and the texts without labels in `joined`.

    The `prompts` `query` and `document`, if given, are put before them as in training.
    """
    unlabeled = [joined.select_columns([UNLABELED])] if UNLABELED in joined.column_names else []
    before = query_document_prompts(text_columns(joined), prompts or {})
    return draw_texts([*tables, *unlabeled], seed, prompts=before)


def query_document_prompts(columns: Sequence[str], prompts: Mapping[str, str]) -> dict[str, str]:
    """The prompt of each column: `query` for anchors, `document` for what is found, none for sentence pairs."""
    if columns[0] != "anchor":
        return {}
    return {name: prompts.get("document" if place else "query", "") for place, name in enumerate(columns)}


class PairCollator:
    """Turns examples into ONE batch of rows, column after column, padded on the right.

    A batch contains:

    - `input_ids` and `attention_mask`, (rows, length), or `input_ids` alone, (1, tokens), if `packed`; `token_type_ids`
      if they are not all 0;
    - `lengths`: tokens of each row;
    - `counts`: rows of each column; an example without a text in a column of negatives adds none;
    - `unlabeled`: number of rows of texts without labels, after the others, if the examples have any;
    - `scores`, (B,), if the examples have a score;
    - `teacher_scores`, (candidates,), and `owners`, (candidates,), of the rows after the first column and without those
      of texts without labels, if the examples have a teacher's scores: the score, and the number of the example.

    Args:
        tokenizer: the model's tokenizer.
        columns: the text columns in the order of their roles. If there are texts without labels, `unlabeled` is the
            last.
        max_length: maximum length of a text in tokens.
        packed: put all rows into one row without padding.
        remember: keep the tokens of every text, for tables that are read more than once.
        prompts: texts that are put before those of a column.
        max_first_length: maximum length of a text of the first column, by default `max_length`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Sequence[str],
        max_length: int,
        packed: bool = False,
        remember: bool = False,
        prompts: Mapping[str, str] | None = None,
        max_first_length: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.columns = list(columns)
        self.max_length = max_length
        self.packed = packed
        self.prompts = dict(prompts or {})
        self.max_first_length = max_first_length or max_length
        # The tokens of the texts that were cut to each length.
        self._known: dict[int, dict[str, np.ndarray]] | None = None
        if remember:
            self._known = {max_length: {}, self.max_first_length: {}}

    def __call__(self, examples: list[dict]) -> dict:
        columns = [[example[column] for example in examples if example[column]] for column in self.columns]
        tokens = self._tokens(columns)
        output: dict = tokens.packed() if self.packed else tokens.padded()
        output.pop("packing", None)  # made again on the device of the model
        output["lengths"] = tokens.lengths.tolist()
        counts = list(map(len, columns))
        if UNLABELED in self.columns:
            output["unlabeled"] = counts.pop()
        output["counts"] = tuple(counts)
        if "score" in examples[0]:
            output["scores"] = torch.tensor([example["score"] for example in examples], dtype=torch.float32)
        if "positive_score" in examples[0]:
            output |= self._teacher_scores(examples)
        return output

    def _teacher_scores(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        candidates = [column for column in self.columns[1:] if column != UNLABELED]
        found = [
            (row, example[column + TEACHER_SCORE])
            for column in candidates
            for row, example in enumerate(examples)
            if example[column]
        ]
        owners, scores = zip(*found, strict=True)
        return {"teacher_scores": torch.tensor(scores, dtype=torch.float32), "owners": torch.tensor(owners)}

    def _tokens(self, columns: list[list[str]]) -> Tokens:
        prompts = [self.prompts.get(name, "") for name in self.columns]
        if any(prompts):
            columns = [[prompt + text for text in column] for prompt, column in zip(prompts, columns, strict=True)]
        others = [text for column in columns[1:] for text in column]
        if self.max_first_length == self.max_length:
            return self._tokenize(columns[0] + others, self.max_length)
        parts = self._tokenize(columns[0], self.max_first_length), self._tokenize(others, self.max_length)
        return join_tokens(parts)

    def _tokenize(self, texts: list[str], max_length: int) -> Tokens:
        if get_worker_info() is not None:  # a forked process does not have the tokenizer's threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self._known is None:
            return tokenize(self.tokenizer, texts, max_length)
        known = self._known[max_length]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            tokens = tokenize(self.tokenizer, new, max_length)
            if tokens.type_ids is not None:  # only ids are kept
                self._known = None
                return tokenize(self.tokenizer, texts, max_length)
            known.update(zip(new, np.split(tokens.ids, tokens.starts[1:-1]), strict=True))
        return from_rows([known[text] for text in texts], self.tokenizer.pad_token_id or 0)


def _ordered_columns(names: Sequence[str]) -> list[str]:
    if "score" in names:
        return ["sentence1", "sentence2", "score"]
    negatives = [name for name in names if re.fullmatch(r"negative(_\d+)?", name)]
    columns = ["anchor", "positive", *sorted(negatives, key=lambda name: int(name[9:] or 0))]
    return [*columns, *(name + TEACHER_SCORE for name in columns[1:] if name + TEACHER_SCORE in names)]


def _check_scores(table: Dataset, argument: str, name: str) -> Dataset:
    """The table with a column of float64; that of a teacher has NaN where there is no text to score."""
    column = table.with_format("arrow")[:][name]
    optional = name.startswith("negative_") and name != "negative" + TEACHER_SCORE
    if str(column.type) in ("string", "large_string"):
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
    try:
        scores = pc.cast(column, "float64").to_numpy(zero_copy_only=False)
    except (ValueError, NotImplementedError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{argument}: column {name} {_describe_texts(column, name)}") from error
    broken = ~np.isfinite(scores)
    if optional:
        broken &= np.asarray([bool(text) for text in table[name.removesuffix(TEACHER_SCORE)]])
    broken = np.flatnonzero(broken)
    if len(broken):
        several = f"{len(broken)} values that are not finite numbers, the first"
        values = "a value that is not a finite number" if len(broken) == 1 else several
        raise ValueError(
            f"{argument}: column {name} holds {values} in row {broken[0] + 1}{INVALID_ROWS if name == 'score' else ''}"
        )
    return table.remove_columns(name).add_column(name, scores.tolist())


def _describe_texts(column: pa.ChunkedArray, name: str) -> str:
    """What is wrong with a column of scores that cannot be cast to numbers, as the end of an error."""
    if str(column.type) not in ("string", "large_string"):
        return f"must hold numbers, not {column.type}"
    wrong = [(row, value) for row, value in enumerate(column.to_pylist(), 1) if value and not _is_number(value)]
    row, value = wrong[0]
    if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value):
        return f"must hold numbers, but has {value!r} in row {row}: write a point instead of the comma"
    if len(wrong) == len(column):
        return f"must hold numbers, but has texts, for example {value!r} in row {row}"
    rows = "one row" if len(wrong) == 1 else f"{len(wrong)} rows"
    return f"must hold numbers, but has others in {rows}, first {value!r} in row {row}" + INVALID_ROWS * (
        name == "score"
    )


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast("float64")
    except ValueError:
        return False
    return True
