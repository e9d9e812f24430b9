"""Heat maps of sizes as HTML tables: a row per depth, a column per number of dimensions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Map:
    """One number per size.

    Args:
        name: what is shown, for example `Agreement`.
        note: a sentence on what the number is.
        values: (layers, dims).
        form: writes a number.
        lowest: the value of the lightest colour; default: the smallest.
        highest: that of the darkest; default: the largest.
    """

    name: str
    note: str
    values: np.ndarray
    form: Callable[[float], str]
    lowest: float | None = None
    highest: float | None = None

    def shade(self, value: float) -> int:
        """How dark a value is, 0 to 100."""
        low = self.values.min() if self.lowest is None else self.lowest
        high = self.values.max() if self.highest is None else self.highest
        return round(100 * float(np.clip((value - low) / (high - low), 0, 1))) if high > low else 0


def table(map_: Map, layers: Sequence[int], dims: Sequence[int], buttons: bool = False) -> str:
    """The table of a map; with `buttons`, each cell can be pressed."""
    head = "".join(f'<th scope="col">{dim}</th>' for dim in dims)
    rows = []
    for n, values in zip(layers, map_.values, strict=True):
        cells = "".join(_cell(map_, n, dim, value, buttons) for dim, value in zip(dims, values, strict=True))
        rows.append(f'<tr><th scope="row">{n}</th>{cells}</tr>')
    return (
        f'<table class="map" aria-label="{map_.name} by layers and dimensions"><thead>'
        f'<tr><td class="axes">layers \\ dims</td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _cell(map_: Map, num_layers: int, dim: int, value: float, button: bool) -> str:
    shade, text = map_.shade(value), map_.form(value)
    dark = ' data-dark="1"' if shade > 55 else ""
    place = f'style="--shade:{shade}%"{dark}'
    if not button:
        return f"<td><span {place}>{text}</span></td>"
    size = f'data-layers="{num_layers}" data-dim="{dim}" aria-label="{num_layers} layers, {dim} dimensions: {text}"'
    return f'<td><button type="button" {size} {place}>{text}</button></td>'
