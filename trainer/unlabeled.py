"""Reading texts without labels, which the sizes learn from in addition to the training rows."""

import re

from .data import check_table, draw_texts
from .shared.roles import ACCEPTED, UnknownColumns
from .shared.tables import read_table
from .shared.texts import check_corpus, read_corpus


def read_unlabeled_texts(path: str, limit: int, seed: int) -> list[str]:
    """Read texts without labels, and draw some at random.

    Args:
        path: a .txt file (one text per line), a table with a column `text`, or a training table, whose texts are all
            taken.
        limit: maximum number of texts.
        seed: seed of the drawing.

    Returns:
        at most `limit` different texts.

    Raises:
        ValueError: the file cannot be read, or has no such column.
    """
    if re.sub(r"\.gz$", "", path.lower()).endswith(".txt"):
        return draw_texts([read_corpus(path, "text", argument="unlabeled_file")], seed, limit)
    table = read_table(path, "unlabeled_file")
    names = set(table.column_names)
    if "text" in names:
        table = check_corpus(table, "text", "unlabeled_file")
    else:
        try:
            table = check_table(table, "unlabeled_file")
        except UnknownColumns as error:
            raise ValueError(
                f"unlabeled_file: {path} has no column text among {', '.join(table.column_names)}, nor those of "
                f"training data: {ACCEPTED}"
            ) from error
    return draw_texts([table], seed, limit)
