"""The demo's results as HTML."""

from collections.abc import Sequence
from html import escape

from .engine import Document, Result
from .heat_map import Map, table

# Characters shown of a document.
_SHOWN = 200


def results(chosen: Result, full: Result, documents: Sequence[Document], k: int) -> str:
    """What a query finds at a size beside what it finds at the full size, with costs and moves."""
    sides = f'<div class="sides">{_sides(chosen, full, documents, k)}</div>'
    return f'<div class="results">{_figures(chosen, full, k)}{sides}</div>'


def _figures(chosen: Result, full: Result, k: int) -> str:
    """What the size costs, and how many results are those of the full size."""
    shared = len({*chosen.rows[:k]} & {*full.rows[:k]})
    count = min(k, len(full.rows))
    figures = (
        ("Same results", f"{shared}", f"of {count}"),
        ("Query encoding", milliseconds(chosen.encode_ms), f"full {milliseconds(full.encode_ms)}"),
        ("Search", milliseconds(chosen.search_ms), f"full {milliseconds(full.search_ms)}"),
        ("Index", megabytes(chosen.index_mb), f"full {megabytes(full.index_mb)}"),
    )
    tiles = (f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in figures)
    return f'<dl class="figures">{"".join(tiles)}</dl>'


def _sides(chosen: Result, full: Result, documents: Sequence[Document], k: int) -> str:
    ranks = {row: rank for rank, row in enumerate(full.rows, 1)}
    places = {row: rank for rank, row in enumerate(chosen.rows, 1)}
    left = [_item(documents[r], s, _move(p, ranks[r], k)) for p, (r, s) in enumerate(_top(chosen, k), 1)]
    right = [_item(documents[r], s, _loss(places[r], k)) for r, s in _top(full, k)]
    return _side("This size", chosen, left) + _side("Full size", full, right)


def _top(result: Result, k: int) -> list[tuple[int, float]]:
    return list(zip(result.rows[:k], result.scores[:k], strict=True))


def _side(name: str, result: Result, items: list[str]) -> str:
    n, dim = result.size
    return (
        f"<section><h3>{name} <span>{n} layer{'s' * (n > 1)} &times; {dim} dims</span></h3>"
        f"<ol>{''.join(items)}</ol></section>"
    )


def _item(document: Document, score: float, move: str) -> str:
    text = " ".join(document.text.split()).removeprefix(document.title).lstrip(" :")
    shown = text if len(text) <= _SHOWN else text[:_SHOWN].rsplit(" ", 1)[0] + " ..."
    return (
        f'<li><div class="line"><b title="{escape(document.title)}">{escape(document.title)}</b>{move}'
        f'<span class="score">{score:.3f}</span></div><p>{escape(shown)}</p></li>'
    )


def _move(place: int, rank: int, k: int) -> str:
    """How a result at `place` of the size has moved from its rank at the full size."""
    if rank > k:
        return f'<span class="move new" title="not among the first {k} at the full size">new, was {rank}</span>'
    if rank == place:
        return '<span class="move same" title="the same rank as at the full size">same</span>'
    up = rank > place
    sign, way = ("&#9650;", "up") if up else ("&#9660;", "down")
    return f'<span class="move {way}" title="rank {rank} at the full size">{sign} {abs(rank - place)}</span>'


def _loss(place: int, k: int) -> str:
    """Where a result of the full size is at the chosen size, if it is not among its first."""
    return f'<span class="move lost" title="its rank at this size">now {place}</span>' if place > k else ""


def similarities(map_: Map, layers: Sequence[int], dims: Sequence[int]) -> str:
    """The similarity of two sentences at every size, and how far the sizes spread."""
    full = map_.values[-1, -1]
    furthest = abs(map_.values - full).max()
    tiles = (
        ("Full size", f"{full:.3f}", f"{layers[-1]} &times; {dims[-1]}"),
        ("Smallest size", f"{map_.values[0, 0]:.3f}", f"{layers[0]} &times; {dims[0]}"),
        ("Largest difference", f"{furthest:.3f}", "from the full size"),
    )
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in tiles)
    return f'<div class="results"><dl class="figures three">{figures}</dl>{table(map_, layers, dims)}</div>'


def message(text: str) -> str:
    """A line in the place of results."""
    return f'<p class="message">{escape(text)}</p>'


def milliseconds(value: float) -> str:
    """
    >>> milliseconds(12.34), milliseconds(0.0567)
    ('12.3 ms', '0.06 ms')
    """
    return f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def megabytes(value: float) -> str:
    """
    >>> megabytes(3.072), megabytes(0.0256)
    ('3.1 MB', '0.03 MB')
    """
    return f"{value:.1f} MB" if value >= 1 else f"{value:.2f} MB"
