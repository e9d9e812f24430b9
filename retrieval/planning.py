"""Which size for which budget: costs of every size on this machine, the Pareto front, and a choice."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from tqdm import tqdm

# Number of texts that are embedded one by one for the latency, and together for the throughput.
_ALONE, _TOGETHER = 16, 128
BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}


@dataclass(frozen=True)
class Cell:
    """What a size costs on this machine, and how good it is.

    Args:
        size: for example `2x64`.
        ms_per_text: median milliseconds from a text to its embedding, one text at a time.
        texts_per_second: when many texts are embedded at once.
        parameters: number of parameters of the model cut to the size's layers.
        memory_mb: memory of these parameters, in megabytes.
        bytes_per_vector: in the chosen precision.
        score: mean over tasks of the main metric, None if nothing was evaluated.
    """

    size: str
    ms_per_text: float
    texts_per_second: float
    parameters: int
    memory_mb: float
    bytes_per_vector: float
    score: float | None = None


@dataclass(frozen=True)
class Limits:
    """What a size may cost at most, and must score at least.

    Args:
        max_ms_per_text: in milliseconds, None for no limit.
        max_bytes_per_vector: None for no limit.
        min_score: None for no limit.

    Raises:
        ValueError: a limit on costs is not above 0, or a limit is not finite.
    """

    max_ms_per_text: float | None = None
    max_bytes_per_vector: float | None = None
    min_score: float | None = None

    def __post_init__(self):
        for name in ("max_ms_per_text", "max_bytes_per_vector"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} is not allowed; use a number above 0")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ValueError(f"min_score: {self.min_score} is not allowed; use a finite number")

    def problems(self, cell: Cell) -> list[str]:
        """Which of the limits a size breaks."""
        problems = []
        if self.max_ms_per_text is not None and cell.ms_per_text > self.max_ms_per_text:
            problems.append(f"takes {cell.ms_per_text:.2f} ms")
        if self.max_bytes_per_vector is not None and cell.bytes_per_vector > self.max_bytes_per_vector:
            problems.append(f"needs {cell.bytes_per_vector:g} bytes per vector")
        if self.min_score is not None and (cell.score is None or cell.score < self.min_score):
            problems.append("has no score" if cell.score is None else f"scores {cell.score:.4f}")
        return problems


def plan(
    model,
    sizes: Sequence,
    texts: Sequence[str],
    scores: dict[str, float] | None = None,
    precision: str = "float32",
    max_length: int | None = None,
    runs: int = 3,
) -> list[Cell]:
    """Measure sizes of a model on this machine.

    The number of dimensions hardly changes the costs, so each depth is measured only once.

    Args:
        model: a `TwoDMSEModel`.
        sizes: (num_layers, dim) of each size.
        texts: similar to the texts that will be embedded; the first 128 are used.
        scores: {size: score}, for example the means of `results.json`.
        precision: of the stored vectors: `float32`, `float16`, `int8` or `binary`.
        max_length: in tokens; longer texts are truncated.
        runs: number of runs that the median is taken over.

    Returns:
        One cell per size, in the order of `sizes`.

    Raises:
        ValueError: `precision` is unknown, or there are no texts.
    """
    if precision not in BYTES:
        raise ValueError(f"precision: {precision!r} is unknown; choose one of {', '.join(BYTES)}")
    if not texts:
        raise ValueError("texts: the list is empty; give at least one text to measure on")
    options = {"max_length": max_length, "show_progress_bar": False}
    small = {n: model.truncate(n) for n in sorted({n for n, _ in sizes})}
    alone, together = list(texts[:_ALONE]), list(texts[:_TOGETHER])
    times: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in small}
    total = (runs + 1) * len(small) * (len(alone) + len(together))
    bar = tqdm(total=total, desc="Measuring", unit="text", leave=False, disable=None)  # on a terminal
    for run in range(runs + 1):  # depths take turns, so that a slow moment affects them all; the first run warms up
        for n, cut in small.items():
            encode = partial(cut.encode, **options)
            each = [_seconds(partial(encode, text), model.device) for text in alone]
            all_at_once = _seconds(partial(encode, together), model.device)
            bar.update(len(alone) + len(together))
            if run:
                times[n][0].extend(each)
                times[n][1].append(all_at_once)
    bar.close()
    cells = []
    for n, dim in sizes:
        parameters = list(small[n].parameters())
        cells.append(
            Cell(
                size=f"{n}x{dim}",
                ms_per_text=1000 * statistics.median(times[n][0]),
                texts_per_second=len(together) / statistics.median(times[n][1]),
                parameters=sum(p.numel() for p in parameters),
                memory_mb=sum(p.nbytes for p in parameters) / 1e6,
                bytes_per_vector=-(-dim * BYTES[precision] // 1),
                score=None if scores is None else scores.get(f"{n}x{dim}"),
            )
        )
    return cells


def pareto(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that no other cell beats by being as good in score, time and bytes and better in one of them."""

    def key(cell: Cell) -> tuple[float, float, float]:
        return (-(cell.score or 0.0), cell.ms_per_text, cell.bytes_per_vector)

    def beaten(cell: Cell) -> bool:
        mine = key(cell)
        return any(key(o) != mine and all(a <= b for a, b in zip(key(o), mine, strict=True)) for o in cells)

    return [cell for cell in cells if not beaten(cell)]


def choose(cells: Sequence[Cell], limits: Limits) -> tuple[Cell, str]:
    """One size within the limits, and the reason for the choice.

    With `min_score`, the fastest size is chosen, and of equally fast ones the one with the fewest bytes. Without it,
    the best score is chosen, and of equally good ones the fastest. If no size has a score, more layers and dimensions
    count as better.

    Returns:
        The cell, and the reason as text.

    Raises:
        ValueError: no size is within the limits; the message names the nearest one.
    """
    fitting = [cell for cell in cells if not limits.problems(cell)]
    if not fitting:
        nearest = min(cells, key=lambda cell: len(limits.problems(cell)))
        raise ValueError(f"limits: no size is within them; {nearest.size} {' and '.join(limits.problems(nearest))}")
    scored = [cell for cell in fitting if cell.score is not None]
    fitting = scored or fitting

    def quality(cell: Cell) -> tuple:
        return (cell.score,) if scored else tuple(map(int, cell.size.split("x")))

    if limits.min_score is not None:
        best = min(fitting, key=lambda cell: (cell.ms_per_text, cell.bytes_per_vector))
        return best, f"the fastest of {len(fitting)} sizes that score at least {limits.min_score:g}{_rest(limits)}"
    best = max(fitting, key=lambda cell: (quality(cell), -cell.ms_per_text, -cell.bytes_per_vector))
    return best, f"the {'best' if scored else 'largest'} of {len(fitting)} sizes{_rest(limits)}"


def as_rows(cells: Sequence[Cell]) -> list[dict]:
    """The cells as dicts, each with whether it is on the Pareto front."""
    front = pareto(cells)
    return [asdict(cell) | {"on_front": cell in front} for cell in cells]


def _rest(limits: Limits) -> str:
    parts = []
    if limits.max_ms_per_text is not None:
        parts.append(f"at most {limits.max_ms_per_text:g} ms per text")
    if limits.max_bytes_per_vector is not None:
        parts.append(f"at most {limits.max_bytes_per_vector:g} bytes per vector")
    return f" within {' and '.join(parts)}" if parts else ""


def _seconds(function: Callable[[], object], device) -> float:
    import torch  # here, so that a script may read BYTES and Limits without it

    start = time.perf_counter()
    function()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
