"""The roles of a table's columns as a user gives them. Imports no library, so that a script refuses a role at once."""

import re

_TEACHER = r"(positive|negative(_\d+)?)_score"
_ROLE = re.compile(rf"anchor|positive|negative(_\d+)?|sentence1|sentence2|score|{_TEACHER}")


def parse_role(entry: str) -> tuple[str, str]:
    """The name of a column and its role, of a text NAME:ROLE.

    Raises:
        ValueError: the text is not of that form, or there is no such role.

    >>> parse_role("query:anchor")
    ('query', 'anchor')
    """
    name, _, role = entry.rpartition(":")
    if not name or not _ROLE.fullmatch(role):
        raise ValueError(
            f"columns: {entry!r} is not NAME:ROLE, for example query:anchor document:positive; roles: anchor, "
            "positive, negative, negative_1, ..., sentence1, sentence2, score"
        )
    return name, role


def is_teacher_score(name: str) -> bool:
    """Whether a column has a teacher's scores of the texts of another one."""
    return re.fullmatch(_TEACHER, name) is not None
