"""Reading texts without labels, which sizes learn from beside the training rows."""

import re

from .data import ACCEPTED, check_table, draw_texts
from .shared.tables import read_table
from .smae.corpus import check_corpus, read_corpus


def read_unlabeled_texts(path: str, limit: int, seed: int) -> list[str]:
    """At most `limit` different texts without labels, drawn by the seed: of a .txt file (a text a line), a table with a
    column `text`, or all texts of a table that one could train on; ValueError naming `unlabeled_file` for anything else."""
    if re.sub(r"\.gz$", "", path.lower()).endswith(".txt"):
        return draw_texts([read_corpus(path, "text", argument="unlabeled_file")], seed, limit)
    table = read_table(path, "unlabeled_file")
    names = set(table.column_names)
    if "text" in names:
        table = check_corpus(table, "text", "unlabeled_file")
    elif names & {"anchor", "sentence1"}:
        table = check_table(table, "unlabeled_file")
    else:
        raise ValueError(
            f"unlabeled_file: {path} has no column text among {', '.join(table.column_names)}, nor those of training data: "
            f"{ACCEPTED}"
        )
    return draw_texts([table], seed, limit)
