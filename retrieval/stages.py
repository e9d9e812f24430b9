"""One stage of a funnel: its dimensions, how many results it keeps, and the exact selection of the best."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PRECISIONS = ("float32", "int8", "binary")
APPROXIMATE = "approximate"
# Scores are examined in groups of this size to find a value that enough of them reach.
_GROUP = 256


class Stage(NamedTuple):
    """Score at `dim` dimensions and keep the `keep` best.

    Only the first stage may use a smaller precision, or the index's graph.

    Attributes:
        dim: dimensions that are compared.
        keep: results that are passed on.
        precision: `float32`, `int8`, `binary` or `approximate`.

    >>> str(Stage(32, 200)), str(Stage(384, 50, "binary"))
    ('32:200', '384:50:binary')
    """

    dim: int
    keep: int
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.dim}:{self.keep}" + ("" if self.precision == "float32" else f":{self.precision}")


def parse_stages(text: str) -> list[Stage]:
    """Stages from text of the form `DIM:KEEP[:PRECISION],...`.

    Raises:
        ValueError: the text has another form.

    >>> [str(stage) for stage in parse_stages("32:200:int8,384:10")]
    ['32:200:int8', '384:10']
    """
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})(?::(\w+))?", part.strip())
        if match is None:
            raise ValueError(
                f"stages: {part[:80]!r} is not DIM:KEEP or DIM:KEEP:PRECISION; write for example 32:200,384:10"
            )
        stages.append(Stage(int(match[1]), int(match[2]), match[3] or "float32"))
    return stages


def check_stages(
    stages: Sequence[Stage | tuple],
    k: int,
    count: int,
    width: int,
    first: Sequence[str] = (*PRECISIONS, APPROXIMATE),
    later: Sequence[str] = ("float32",),
) -> list[Stage]:
    """The stages as `Stage` objects, checked against an index.

    Args:
        stages: (dim, keep) or (dim, keep, precision) of each stage.
        k: results per query.
        count: vectors in the index.
        width: dimensions of a vector.
        first: precisions that the first stage may have.
        later: precisions that the others may have.

    Raises:
        ValueError: the index cannot be searched with these stages.
    """
    if not 1 <= k <= count:
        raise ValueError(f"k: {k} is not allowed; this index has {count} vectors, so use 1 to {count}")
    checked = [Stage(*stage) for stage in stages]
    if not checked:
        raise ValueError("stages: the list is empty; give at least one stage")
    shown = ",".join(map(str, checked))
    for index, stage in enumerate(checked):
        if not 1 <= stage.dim <= width:
            raise ValueError(f"stages: {stage.dim} dimensions in {shown} are not allowed; the vectors have {width}")
        if stage.precision not in first:
            raise ValueError(f"stages: {stage.precision!r} is unknown; choose one of {', '.join(first)}")
        if index and stage.precision not in later:
            raise ValueError(f"stages: {stage} is not allowed; only the first stage may be {stage.precision}")
    keeps = [stage.keep for stage in checked]
    if keeps != sorted(keeps, reverse=True):
        raise ValueError(f"stages: {shown} keeps more in a later stage than in an earlier one")
    if keeps[-1] < k:
        raise ValueError(f"stages: {shown} keeps {keeps[-1]} in the last stage, fewer than k ({k})")
    return checked


def select(scores: np.ndarray, keep: int, rank: np.ndarray | None = None) -> np.ndarray:
    """Positions of the `keep` highest scores, best first; of equal scores, those of lower rank first.

    Args:
        scores: (N,).
        keep: number of positions.
        rank: (N,) place of each score in the order that breaks ties; default: the positions themselves.

    >>> select(np.array([0.5, 0.9, 0.1, 0.9]), 3).tolist()
    [1, 3, 0]
    """
    candidates = np.flatnonzero(scores >= _reached_by(scores, keep))
    second = candidates if rank is None else rank[candidates]
    order = np.lexsort((second, -scores[candidates].astype(np.float64)))
    return candidates[order[:keep]]


def _reached_by(scores: np.ndarray, keep: int) -> float:
    """A value that at least `keep` scores reach, but not many more: `keep` groups have a score this high."""
    groups = len(scores) // _GROUP
    if groups <= keep:
        return np.partition(scores, len(scores) - keep)[len(scores) - keep] if keep < len(scores) else scores.min()
    highest = scores[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1)
    return np.partition(highest, groups - keep)[groups - keep]
