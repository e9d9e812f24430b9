"""Which size for which budget: costs of every size on this machine, the Pareto front, and one choice."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

# Texts that are embedded one at a time for the latency, and together for the throughput.
_ALONE, _TOGETHER = 16, 128
BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}


@dataclass(frozen=True)
class Cell:
    """What a size costs here, and how good it is.

    Args:
        size: for example `2x64`.
        ms_per_text: milliseconds from a text to its embedding, one text at a time, median.
        texts_per_second: of many texts at once.
        parameters: of the model cut to the size's layers.
        memory_mb: of these parameters, in megabytes.
        bytes_per_vector: in the precision asked for.
        score: mean over tasks of the main metric, None where nothing was evaluated.
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
    """What a size may cost at most, and must score at least; None for no limit."""

    max_ms_per_text: float | None = None
    max_bytes_per_vector: float | None = None
    min_score: float | None = None

    def __post_init__(self):
        for name in ("max_ms_per_text", "max_bytes_per_vector"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} is not allowed; use a number above 0")

    def faults(self, cell: Cell) -> list[str]:
        """Which of the limits a size breaks."""
        faults = []
        if self.max_ms_per_text is not None and cell.ms_per_text > self.max_ms_per_text:
            faults.append(f"takes {cell.ms_per_text:.2f} ms")
        if self.max_bytes_per_vector is not None and cell.bytes_per_vector > self.max_bytes_per_vector:
            faults.append(f"needs {cell.bytes_per_vector:g} bytes a vector")
        if self.min_score is not None and (cell.score is None or cell.score < self.min_score):
            faults.append("has no score" if cell.score is None else f"scores {cell.score:.4f}")
        return faults


def plan(
    model,
    sizes: Sequence,
    texts: Sequence[str],
    scores: dict[str, float] | None = None,
    precision: str = "float32",
    max_length: int | None = None,
    runs: int = 3,
) -> list[Cell]:
    """
    Measure sizes of a model on this machine; dims cost nothing to speak of, so that each depth is measured once.

    Args:
        model: a `TwoDMSEModel`.
        sizes: (num_layers, dim) of each.
        texts: like those that will be embedded; as many as there are, up to 128.
        scores: {size: score}, for example the mean of `results.json`.
        precision: of the stored vectors: `float32`, `float16`, `int8` or `binary`.
        runs: of which the median is taken.

    Returns:
        a cell a size, in the order given.
    """
    if precision not in BYTES:
        raise ValueError(f"precision: {precision!r} is unknown; choose one of {', '.join(BYTES)}")
    if not texts:
        raise ValueError("texts: none is given to measure on")
    options = {"max_length": max_length, "show_progress_bar": False}
    small = {n: model.truncate(n) for n in sorted({n for n, _ in sizes})}
    alone, together = list(texts[:_ALONE]), list(texts[:_TOGETHER])
    times: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in small}
    for run in range(runs + 1):  # depths in turn, so that a slow moment meets them all; the first run warms up
        for n, cut in small.items():
            each = [_seconds(lambda cut=cut, text=text: cut.encode(text, **options), model.device) for text in alone]
            all_at_once = _seconds(lambda cut=cut: cut.encode(together, **options), model.device)
            if run:
                times[n][0].extend(each)
                times[n][1].append(all_at_once)
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
    """The cells that no other one beats: as good in score, time and bytes, and better in one of them."""

    def key(cell: Cell) -> tuple[float, float, float]:
        return (-(cell.score or 0.0), cell.ms_per_text, cell.bytes_per_vector)

    def beaten(cell: Cell) -> bool:
        mine = key(cell)
        return any(key(o) != mine and all(a <= b for a, b in zip(key(o), mine, strict=True)) for o in cells)

    return [cell for cell in cells if not beaten(cell)]


def choose(cells: Sequence[Cell], limits: Limits) -> tuple[Cell, str]:
    """
    One size within the limits, and why.

    Where a score must be reached, the fastest, and of these the one of fewest bytes; else the best score, and of these
    the fastest. Where no size has a score, more layers and dims count as better. ValueError where no size is within
    the limits, naming what comes nearest.
    """
    fitting = [cell for cell in cells if not limits.faults(cell)]
    if not fitting:
        nearest = min(cells, key=lambda cell: len(limits.faults(cell)))
        raise ValueError(f"limits: no size is within them; {nearest.size} {' and '.join(limits.faults(nearest))}")
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
    """The cells as dicts, with whether each is on the front."""
    front = pareto(cells)
    return [asdict(cell) | {"on_front": cell in front} for cell in cells]


def _rest(limits: Limits) -> str:
    parts = []
    if limits.max_ms_per_text is not None:
        parts.append(f"at most {limits.max_ms_per_text:g} ms a text")
    if limits.max_bytes_per_vector is not None:
        parts.append(f"at most {limits.max_bytes_per_vector:g} bytes a vector")
    return f" within {' and '.join(parts)}" if parts else ""


def _seconds(function: Callable[[], object], device) -> float:
    import torch  # here, so that a script may read BYTES and Limits without it

    start = time.perf_counter()
    function()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
