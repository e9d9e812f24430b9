"""Tables as people have them: which column is the anchor, the positive, a negative or the score."""

import itertools
import re
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, LargeList, List, Value
from transformers.utils import logging

from .roles import is_teacher_score, parse_role

logger = logging.get_logger(__name__)

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
_SCORE = ("score", "label", "labels", "similarity", "similarityscore", "relatednessscore", "isduplicate")
# Judgements of a document for a query: read as the score if there are rows that are not relevant.
_JUDGEMENT = (
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
    given = _given(table.column_names, columns or (), argument)
    judged = _judged(table, given, argument)
    roles = _roles(table.column_names, given, judged, argument)
    if "score" in roles.values():
        _check_classes(table, next(name for name, role in roles.items() if role == "score"), given, argument)
    renamed = {name: role for name, role in roles.items() if name != role}
    left_out = [name for name in table.column_names if name not in roles]
    if "positive" in roles.values():
        _refuse_zeros(table, judged, left_out, argument)
    if renamed:
        logger.warning(f"{argument}: {', '.join(f'{name} is read as {role}' for name, role in renamed.items())}")
    if left_out:
        logger.warning(f"{argument}: the columns {', '.join(left_out)} are left out")
    table = table.select_columns(list(roles))
    # In two steps, because a name may be taken by another column until that has its new one.
    table = table.rename_columns({name: f"\0{role}" for name, role in roles.items()})
    return _without_lists(table.rename_columns({f"\0{role}": role for role in roles.values()}))


def _given(names: Sequence[str], columns: Sequence[str], argument: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for entry in columns:
        name, role = parse_role(entry)
        if name not in names:
            raise ValueError(f"columns: {argument} has no column {name}, only {', '.join(names)}")
        if role in given.values():
            raise ValueError(f"columns: two columns are given as {role}; name one")
        given[name] = role
    return given


def _judged(table: Dataset, given: dict[str, str], argument: str) -> list[str]:
    """The columns that judge documents, and find some of them not relevant.

    Raises:
        ValueError: a column finds none relevant.
    """
    judged = []
    for name in table.column_names:
        if name in given or _plain(name) not in _JUDGEMENT:
            continue
        values = _numbers(table, name)
        if values and max(values) <= 0:
            raise ValueError(f"{argument}: the column {name} is {max(values):g} in every row, so no row is a positive")
        if min(values, default=1) <= 0 or (not values and "relevan" in _plain(name)):
            judged.append(name)
    return judged


def _refuse_zeros(table: Dataset, judged: Sequence[str], left_out: Sequence[str], argument: str) -> None:
    """ValueError if a column that is left out says that some of the pairs are no positives."""
    for name in left_out:
        if name in judged or (_plain(name) in _SCORE and set(_numbers(table, name)) == {0, 1}):
            raise ValueError(
                f"{argument}: the column {name} is 0 in some rows, which would be trained as positives; keep the rows "
                "that are positives, and leave out the column"
            )


def _numbers(table: Dataset, name: str) -> list[float]:
    """The different numbers in a column; none if it has anything else."""
    if not isinstance(table.features[name], (ClassLabel, Value)):
        return []
    try:
        return [float(value) for value in table.unique(name) if value is not None]
    except (TypeError, ValueError):
        return []


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _roles(names: Sequence[str], given: dict[str, str], judged: Sequence[str], argument: str) -> dict[str, str]:
    """The role of each column that has one."""
    free = [name for name in names if name not in given]
    plain = {name: _plain(name) for name in free}
    first = _pick(free, plain, _FIRST, ("anchor", "sentence1"), given)
    second = _pick(free, plain, _SECOND, ("positive", "sentence2"), given)
    score = _pick(free, plain, _SCORE, ("score",), given) or list(judged)
    negatives = {name: match[1] for name in free if (match := _NEGATIVE.fullmatch(plain[name]))}
    scored = (
        bool(score) and not negatives and not any(role.startswith(("neg", "anc", "pos")) for role in given.values())
    )
    unclear = len(first) != 1 or len(second) != 1 or len(score) > 1
    if unclear or (not scored and not given and (plain[first[0]], plain[second[0]]) in _SCORED_ONLY):
        raise UnknownColumns(
            f"{argument}: the columns ({', '.join(names)}) are not one of the accepted sets: {ACCEPTED}; name their "
            "roles, for example --columns query:anchor document:positive (in Python, rename_columns)"
        )
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


def _check_classes(table: Dataset, name: str, given: dict[str, str], argument: str) -> None:
    """ValueError if a column that was not named as the score has classes, such as those of inference data."""
    feature = table.features[name]
    classes = isinstance(feature, ClassLabel) and feature.num_classes > 2
    if (
        not classes
        and _plain(name) not in ("score", *_JUDGEMENT)
        and str(getattr(feature, "dtype", "")).startswith("int")
    ):
        classes = set(table.unique(name)) in ({0, 1, 2}, {-1, 0, 1, 2})
    if classes and name not in given:
        raise ValueError(
            f"{argument}: the column {name} has three classes, as inference data has, and no similarity; keep the rows "
            f"of one class as (anchor, positive), or pass --columns {name}:score if it is a similarity"
        )


def _without_lists(table: Dataset) -> Dataset:
    # Polars writes large lists.
    kinds = {name: type(feature) for name, feature in table.features.items() if name != "score"}
    lists = [name for name, kind in kinds.items() if issubclass(kind, (List, LargeList))]
    if not lists:
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
