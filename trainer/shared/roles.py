"""The roles of a table's columns, found by their names or given by a user.

Imports no library, so that a script refuses wrong names at once.
"""

import re
from collections.abc import Mapping, Sequence

_TEACHER = r"(positive|negative(_\d+)?)_score"
_ROLE = re.compile(rf"anchor|positive|negative(_\d+)?|sentence1|sentence2|score|{_TEACHER}")

# The first part of the name of each column with a teacher's scores is the column of texts that they belong to.
TEACHER_SCORE = "_score"
ACCEPTED = (
    "(anchor, positive[, negative, negative_1, ...]), also with a teacher's score of each (positive_score, "
    "negative_score, ...), or (sentence1, sentence2, score)"
)
# Names of columns, in lower case and without separators, for each role.
_FIRST = (
    *("anchor", "query", "question", "text1", "texta", "sentence1", "sentencea", "string1", "question1", "sent1"),
    *("anchors", "queries", "questions"),
)
_SECOND = (
    *("positive", "pos", "document", "doc", "passage", "answer", "response", "text2", "textb", "sentence2"),
    *("sentenceb", "string2", "question2", "sent2", "positivepassage", "positivedocument"),
    *("positives", "documents", "docs", "passages", "answers", "responses", "positivepassages", "positivedocuments"),
)
SCORES = ("score", "label", "labels", "similarity", "similarityscore", "relatednessscore", "isduplicate")
# Judgements of a document for a query: read as the score if there are rows that are not relevant.
JUDGEMENTS = (
    *("relevance", "relevant", "isrelevant", "relevancy", "relevancelabel", "relevancescore", "relevancegrade"),
    *("rel", "qrel", "qrels", "grade", "gain", "judgment", "judgement", "isselected", "iscorrect", "ispositive"),
    *("match", "ismatch", "target"),
)
# Pairs of sentences that need not mean the same: without a score, the score is missing.
_SCORED_ONLY = (
    *(("sentence1", "sentence2"), ("sentencea", "sentenceb")),
    *(("question1", "question2"), ("sent1", "sent2")),
)
_NEGATIVE = re.compile(r"(?:hard)?(?:negative|neg)s?(?:passage|document|doc)?s?(\d*)")


class UnknownColumns(ValueError):
    """A table does not have the columns of training data."""


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


def given_roles(names: Sequence[str], columns: Sequence[str], argument: str) -> dict[str, str]:
    """The columns whose roles a user gives, see `parse_role`."""
    given: dict[str, str] = {}
    for entry in columns:
        name, role = parse_role(entry)
        if name not in names:
            raise ValueError(f"columns: {argument} has no column {name}, only {', '.join(names)}")
        if role in given.values():
            raise ValueError(f"columns: two columns are given as {role}; name one")
        given[name] = role
    return given


def check_names(names: Sequence[str], columns: Sequence[str], argument: str) -> None:
    """The errors of `given_roles` and `find_roles`, as far as they show without the values of a table."""
    given = given_roles(names, columns, argument)
    judged = [name for name in names if name not in given and plain_name(name) in JUDGEMENTS]
    find_roles(names, given, judged[:1], argument)


def find_roles(names: Sequence[str], given: dict[str, str], judged: Sequence[str], argument: str) -> dict[str, str]:
    """The role of each column that has one.

    Args:
        names: the columns of a table.
        given: the roles that a user gives.
        judged: columns that judge documents, and find some of them not relevant.
        argument: the name that errors give to the table.

    Raises:
        UnknownColumns: a role is missing, or several columns could have it.
        ValueError: columns of negatives, or of a teacher's scores, do not fit.
    """
    free = [name for name in names if name not in given]
    plain = {name: plain_name(name) for name in free}
    first = _pick(free, plain, _FIRST, ("anchor", "sentence1"), given)
    second = _pick(free, plain, _SECOND, ("positive", "sentence2"), given)
    score = _pick(free, plain, SCORES, ("score",), given) or list(judged)
    negatives = {name: match[1] for name in free if (match := _NEGATIVE.fullmatch(plain[name]))}
    scored = (
        bool(score) and not negatives and not any(role.startswith(("neg", "anc", "pos")) for role in given.values())
    )
    unclear = len(first) != 1 or len(second) != 1 or len(score) > 1
    if unclear or (not scored and not given and (plain[first[0]], plain[second[0]]) in _SCORED_ONLY):
        raise UnknownColumns(_describe_unclear(names, {"anchor": first, "positive": second, "score": score}, argument))
    roles = dict(
        zip((first[0], second[0]), ("sentence1", "sentence2") if scored else ("anchor", "positive"), strict=True)
    )
    if scored:
        return roles | {score[0]: "score"}
    numbered = {name: f"negative_{number}" if number else "negative" for name, number in negatives.items()}
    numbered |= {name: role for name, role in given.items() if role.startswith("negative")}
    if len(set(numbered.values())) < len(numbered):
        raise ValueError(f"{argument}: the columns {', '.join(numbered)} have one role; name them with --columns")
    return roles | numbered | _teacher_scores(free, given, ["positive", *numbered.values()], argument)


def _describe_unclear(names: Sequence[str], found: Mapping[str, Sequence[str]], argument: str) -> str:
    """What is wrong with the names of a table, as an error; `found` has the columns that may have each role."""
    if _is_row(names):
        return (
            f"{argument}: the first line ({names[0][:40]} ...) seems to be a row; write the names of the columns above "
            "it, such as anchor, positive, negative"
        )
    advice = "name their roles, for example --columns query:anchor document:positive (in Python, rename_columns)"
    for role, several in found.items():
        if len(several) > 1:
            advice = f"{' and '.join(several)} may be the {role}: choose one, for example --columns {several[0]}:{role}"
            break
    return f"{argument}: the columns ({', '.join(names)}) are not one of the accepted sets: {ACCEPTED}; {advice}"


def _is_row(names: Sequence[str]) -> bool:
    """Whether what is read as the names of columns are texts or numbers, of a file without such a line."""
    return any(len(name.split()) > 4 or len(name) > 60 for name in names) or all(map(_is_number, names))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.]+", text) is not None


def _teacher_scores(free: list[str], given: dict[str, str], texts: list[str], argument: str) -> dict[str, str]:
    """The columns with a teacher's scores, of all texts or of none."""
    scores = {name: name for name in free if is_teacher_score(name)}
    scores |= {name: role for name, role in given.items() if is_teacher_score(role)}
    missing = [text + TEACHER_SCORE for text in texts if text + TEACHER_SCORE not in scores.values()]
    if scores and missing:
        raise ValueError(f"{argument}: there are columns {', '.join(scores)}, but no {missing[0]}")
    return {name: role for name, role in scores.items() if role.removesuffix(TEACHER_SCORE) in texts}


def _pick(
    free: list[str], plain: dict[str, str], known: Sequence[str], roles: Sequence[str], given: dict[str, str]
) -> list[str]:
    """The columns that may have a role: the one that is given, the one of exactly that name, or all known names."""
    chosen = [name for name, role in given.items() if role in roles]
    exact = [name for name in free if name in roles]
    return chosen or (exact if len(exact) == 1 else []) or [name for name in free if plain[name] in known]


def plain_name(name: str) -> str:
    """A name in lower case without separators, as the known names are written here."""
    return re.sub(r"[\W_]", "", name.lower())
