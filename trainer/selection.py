"""The filters that select negatives. torch is imported late, so a script refuses wrong flags at once."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLINGS = ("top", "random")


@dataclass(frozen=True)
class NegativeSelection:
    """Selects the negatives of a row among its candidates: the corpus without the anchor's own text and its positives.

    Ranks count the candidates from 1, nearest first.

    Raises:
        ValueError: values that are not allowed; the message names all of them.
    """

    num_negatives: int = field(default=1, metadata={"help": "Negatives per row; rows with fewer left are dropped."})
    range_min: int = field(
        default=10, metadata={"help": "Number of best ranks to skip, which are most likely unlabeled positives."}
    )
    range_max: int = field(default=100, metadata={"help": "Deepest rank that is considered."})
    margin: float | None = field(
        default=None, metadata={"help": "A negative's cosine is at most the positive's minus this. Default: off."}
    )
    relative_margin: float | None = field(
        default=None,
        metadata={"help": "A negative's cosine is at most the positive's minus this fraction of it. Default: off."},
    )
    max_score: float | None = field(default=None, metadata={"help": "Maximum cosine of a negative. Default: off."})
    sampling: str = field(
        default="top", metadata={"help": "top: the best ranked of the candidates left; random: any of them."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random sampling."})

    def __post_init__(self):
        problems = []
        for name, lowest in (("num_negatives", 1), ("range_min", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                problems.append(f"{name}: {getattr(self, name)} is not allowed; use a whole number from {lowest}")
        if self.range_max < self.range_min + self.num_negatives:
            problems.append(
                f"range_max: {self.range_max} must be at least range_min + num_negatives, "
                f"{self.range_min} + {self.num_negatives}"
            )
        for name, lowest, highest in (("margin", 0, 2), ("relative_margin", 0, 1), ("max_score", -1, 1)):
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                problems.append(f"{name}: {value} is not allowed; use a number from {lowest} to {highest}")
        if self.sampling not in SAMPLINGS:
            problems.append(f"sampling: {self.sampling!r} is unknown; choose one of {', '.join(SAMPLINGS)}")
        if problems:
            raise ValueError("; ".join(problems))

    def __str__(self) -> str:
        """The filters that are set, for messages.

        Examples:
            >>> str(NegativeSelection(margin=0.1))
            'range_min 10, range_max 100, margin 0.1'
        """
        names = ("range_min", "range_max", "margin", "relative_margin", "max_score")
        return ", ".join(f"{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None)

    def highest_cosine(self, positives: "torch.Tensor") -> "torch.Tensor":
        """The maximum cosine of a negative.

        The relative margin is a fraction of the absolute value, so that the maximum is below the positive's cosine even
        if that is negative.

        Args:
            positives: (rows,), the cosine of each row's positive.

        Returns:
            (rows,).

        Examples:
            >>> import torch
            >>> NegativeSelection(margin=0.125, relative_margin=0.5).highest_cosine(torch.tensor([0.5, 0.125, -0.5]))
            tensor([ 0.2500,  0.0000, -0.7500])
        """
        import torch

        highest = torch.full_like(positives, math.inf if self.max_score is None else self.max_score)
        if self.margin is not None:
            highest = torch.minimum(highest, positives - self.margin)
        if self.relative_margin is not None:
            highest = torch.minimum(highest, positives - self.relative_margin * positives.abs())
        return highest
