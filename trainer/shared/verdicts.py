"""Columns that say which of the pairs of a table mean the same: without them, the others would be positives."""

import shlex
from collections.abc import Mapping, Sequence

from datasets import ClassLabel, Dataset, Value

from .roles import JUDGEMENTS, SCORES, plain_name

# A verdict has few different values, which show in the first rows of a table.
_VALUES, _ROWS = 10, 1000
# Values, in the form of `plain_name`, of a pair that is no positive.
_REJECTED = (
    *("contradiction", "notentailment", "nonentailment", "irrelevant", "notrelevant", "nonrelevant", "unrelated"),
    *("notduplicate", "nonduplicate", "notparaphrase", "nonparaphrase", "incorrect", "different"),
)
# The same if all values of the column are such words: alone, "no" may be Norwegian.
_DOUBTFUL = ("no", "false", "negative", "neutral", "neg", "wrong", "bad")
_ACCEPTED = ("yes", "true", "positive", "pos", "right", "correct", "good", "entailment", "maybe", "unsure", "unknown")
# Sets of numbers that are verdicts; the last three may be anything in a column of an unknown name.
_NUMBERS: tuple[set[float], ...] = ({0, 1}, {-1, 1}, {-1, 0, 1}, {0, 1, 2}, {-1, 0, 1, 2})


def find_judged(table: Dataset, given: Mapping[str, str], argument: str) -> list[str]:
    """The columns that judge documents, and find some of them not relevant.

    Raises:
        ValueError: a column finds none relevant.
    """
    judged = []
    for name in table.column_names:
        if name in given or plain_name(name) not in JUDGEMENTS:
            continue
        values = _numbers(_distinct(table, name))
        if values and max(values) <= 0:
            raise ValueError(f"{argument}: the column {name} is {max(values):g} in every row, so no row is a positive")
        if min(values, default=1) <= 0 or (not values and "relevan" in plain_name(name)):
            judged.append(name)
    return judged


def refuse_rejected(
    table: Dataset, judged: Sequence[str], left_out: Sequence[str], pair: Sequence[str], named: bool, argument: str
) -> None:
    """ValueError if a column that is left out says that some of the pairs are no positives.

    Args:
        table: the table.
        judged: see `find_judged`.
        left_out: the columns to look at.
        pair: anchor and positive as `name:role`.
        named: a user has named both, and so knows what the other columns are.
        argument: the name that the error gives to the table.
    """
    for name in left_out:
        known = plain_name(name) in (*SCORES, *JUDGEMENTS) or plain_name(name).endswith("label")
        values = _few(table, name)
        few = known or len(values) < len(table)  # numbers of the rows of a very small table are no verdicts
        value = 0 if name in judged else _rejected(values, known, named) if few else None
        if value is not None:
            other = "" if known else ", also if it says something else"
            if not known and not named and _rejected(values, known, named=True) is None:
                flags = f"--columns {shlex.join(pair)}"
                other = f"; if it says something else, leave it out, or name the others for finetune.py: {flags}"
            raise ValueError(
                f"{argument}: the column {name} is {value} in some rows, which would be trained as positives; keep the "
                f"rows that are positives, and leave out the column{other}"
            )


def _rejected(values: Sequence, known: bool, named: bool) -> object:
    """The one of a column's values that says that a pair is no positive, if there is one."""
    words = {plain_name(str(value)): value for value in values}
    verdicts = words.keys() <= {*_REJECTED, *_DOUBTFUL, *_ACCEPTED}
    doubtful = _DOUBTFUL if known or (verdicts and not named) else ()
    word = next((word for word in (*_REJECTED, *doubtful) if word in words), None)
    if word is not None and len(words) > 1:
        return words[word]
    numbers = set(_numbers(values))
    allowed = _NUMBERS if known else () if named else _NUMBERS[:2]
    return f"{min(numbers):g}" if numbers in allowed else None


def check_classes(table: Dataset, name: str, given: Mapping[str, str], argument: str) -> None:
    """ValueError if a column that was not named as the score has classes, such as those of inference data."""
    feature = table.features[name]
    classes = isinstance(feature, ClassLabel) and feature.num_classes > 2
    if (
        not classes
        and plain_name(name) not in ("score", *JUDGEMENTS)
        and str(getattr(feature, "dtype", "")).startswith("int")
    ):
        classes = set(table.unique(name)) in ({0, 1, 2}, {-1, 0, 1, 2})
    if classes and name not in given:
        raise ValueError(
            f"{argument}: the column {name} has three classes, as inference data has, and no similarity; keep the rows "
            f"of one class as (anchor, positive), or pass --columns {name}:score if it is a similarity"
        )


def _few(table: Dataset, name: str) -> list:
    """The different values of a column, classes by their names; none if it has many."""
    start = table.select(range(min(_ROWS, len(table)))).select_columns([name])
    values = [] if len(_distinct(start, name)) > _VALUES else _distinct(table, name)
    feature = table.features[name]
    if isinstance(feature, ClassLabel):
        values = [feature.names[value] for value in values if value >= 0]
    return values if len(values) <= _VALUES else []


def _distinct(table: Dataset, name: str) -> list:
    """The different values of a column of single values that are not missing."""
    if not isinstance(table.features[name], (ClassLabel, Value)):
        return []
    return [value for value in table.unique(name) if value is not None]


def _numbers(values: Sequence) -> list[float]:
    """The values as numbers; none if there is anything else."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return []
