"""One stage of a funnel: what it computes, how many it keeps, and the exact selection of the best."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PRECISIONS = ("float32", "int8", "binary")
APPROXIMATE = "approximate"
# Scores are looked at in groups of this many to find a value that enough of them reach.
_GROUP = 256


class Stage(NamedTuple):
    """Score at `dim` dimensions and keep the `keep` best.

    The first stage alone may be of a smaller precision (`int8`, `binary`), or `approximate`, by the index's graph.

    >>> str(Stage(32, 200)), str(Stage(384, 50, "binary"))
    ('32:200', '384:50:binary')
    """

    dim: int
    keep: int
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.dim}:{self.keep}" + ("" if self.precision == "float32" else f":{self.precision}")


def parse_stages(text: str) -> list[Stage]:
    """Stages from `DIM:KEEP[:PRECISION],...`; ValueError for anything else.

    >>> [str(stage) for stage in parse_stages("32:200:int8,384:10")]
    ['32:200:int8', '384:10']
    """
    stages = []
    for part in text.split(","):
        dim, _, rest = part.strip().partition(":")
        keep, _, precision = rest.partition(":")
        if not (dim.isdigit() and keep.isdigit()):
            raise ValueError(f"stages: {part!r} is not DIM:KEEP or DIM:KEEP:PRECISION, as in 32:200,384:10")
        stages.append(Stage(int(dim), int(keep), precision or "float32"))
    return stages


def check_stages(stages: Sequence[Stage], k: int, count: int, width: int) -> list[Stage]:
    """The stages as such; ValueError where they cannot be searched with.

    Args:
        k: results asked for; count: vectors in the index; width: dimensions of a vector.
    """
    if not 1 <= k <= count:
        raise ValueError(f"k: {k} is not allowed; this index holds {count} vectors, so use 1 to {count}")
    stages = [Stage(*stage) for stage in stages]
    if not stages:
        raise ValueError("stages: none is given")
    shown = ",".join(map(str, stages))
    for index, stage in enumerate(stages):
        if not 1 <= stage.dim <= width:
            raise ValueError(f"stages: {stage.dim} dimensions in {shown} are not allowed; the vectors have {width}")
        if stage.precision not in (*PRECISIONS, APPROXIMATE):
            known = ", ".join((*PRECISIONS, APPROXIMATE))
            raise ValueError(f"stages: {stage.precision!r} is unknown; choose one of {known}")
        if index and stage.precision != "float32":
            raise ValueError(f"stages: {stage} is not allowed; only the first stage may be {stage.precision}")
    keeps = [stage.keep for stage in stages]
    if keeps != sorted(keeps, reverse=True):
        raise ValueError(f"stages: {shown} keeps more in a later stage than in an earlier one")
    if keeps[-1] < k:
        raise ValueError(f"stages: {shown} keeps {keeps[-1]} in the end, fewer than k ({k})")
    return stages


def select(scores: np.ndarray, keep: int, rank: np.ndarray | None = None) -> np.ndarray:
    """Positions of the `keep` highest scores, best first; of equal ones, those of lower rank.

    Args:
        scores: (N,).
        rank: (N,) place of each in the order that ties are broken by; their positions when left out.
    """
    candidates = np.flatnonzero(scores >= _reached_by(scores, keep))
    second = candidates if rank is None else rank[candidates]
    order = np.lexsort((second, -scores[candidates].astype(np.float64)))
    return candidates[order[:keep]]


def _reached_by(scores: np.ndarray, keep: int) -> float:
    """A value that at least `keep` scores reach, and not many more: that many groups have a score so high."""
    groups = len(scores) // _GROUP
    if groups <= keep:
        return np.partition(scores, len(scores) - keep)[len(scores) - keep] if keep < len(scores) else scores.min()
    highest = scores[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1)
    return np.partition(highest, groups - keep)[groups - keep]
