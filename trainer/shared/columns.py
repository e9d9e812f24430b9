"""Tables as people have them: which column is the anchor, the positive, a negative or the score."""

import itertools
from collections.abc import Sequence

from datasets import Dataset, LargeList, List
from transformers.utils import logging

from .roles import find_roles, given_roles
from .verdicts import check_classes, find_judged, refuse_rejected

logger = logging.get_logger(__name__)


def name_columns(table: Dataset, columns: Sequence[str] | None, argument: str) -> Dataset:
    """Give the columns of a table the names of their roles, and leave out columns without a role, with a note of both.

    Lists of positives become one row each, lists of negatives numbered columns.

    Args:
        table: the table.
        columns: roles that are not found by name, as `name:role`.
        argument: the name that errors give to the table.

    Raises:
        ValueError: a role is missing or two columns could have it; the message lists the columns.
    """
    given = given_roles(table.column_names, columns or (), argument)
    judged = find_judged(table, given, argument)
    roles = find_roles(table.column_names, given, judged, argument)
    if "score" in roles.values():
        check_classes(table, next(name for name, role in roles.items() if role == "score"), given, argument)
    renamed = {name: role for name, role in roles.items() if name != role}
    left_out = [name for name in table.column_names if name not in roles]
    if "positive" in roles.values():
        named = {"anchor", "positive"} <= set(given.values())
        pair = [f"{name}:{role}" for name, role in roles.items() if role in ("anchor", "positive")]
        refuse_rejected(table, judged, left_out, pair, named, argument)
    if renamed:
        logger.warning(f"{argument}: {', '.join(f'{name} is read as {role}' for name, role in renamed.items())}")
    if left_out:
        columns = f"column {left_out[0]} is" if len(left_out) == 1 else f"columns {', '.join(left_out)} are"
        logger.warning(f"{argument}: the {columns} left out")
    table = table.select_columns(list(roles))
    # In two steps, because a name may be taken by another column until that has its new one.
    table = table.rename_columns({name: f"\0{role}" for name, role in roles.items()})
    return _without_lists(table.rename_columns({f"\0{role}": role for role in roles.values()}))


def _without_lists(table: Dataset) -> Dataset:
    # Polars writes large lists.
    kinds = {name: type(feature) for name, feature in table.features.items() if name != "score"}
    lists = [name for name, kind in kinds.items() if issubclass(kind, (List, LargeList))]
    if not lists or "positive" not in table.column_names:
        return table
    most = max((len(row["negative"] or []) for row in table), default=0) if "negative" in lists else 0
    numbered = (f"negative_{n}" for n in itertools.count(1))
    added = list(itertools.islice((name for name in numbered if name not in table.column_names), most))

    def expand(batch: dict) -> dict:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        output: list[dict] = []
        for row in rows:
            negatives = row.pop("negative", None) if "negative" in lists else None
            more = dict(itertools.zip_longest(added, negatives or []))
            positives = row["positive"] if "positive" in lists else [row["positive"]]
            output += [{**row, **more, "positive": positive} for positive in positives or [None]]
        return {name: [row[name] for row in output] for name in output[0]}

    return table.map(expand, batched=True, remove_columns=table.column_names, desc="Rows of each positive")
