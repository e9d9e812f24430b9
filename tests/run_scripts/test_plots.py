"""Pictures: one colour per method, ours on top, sizes as ticks, trained sizes framed, and no text outside its frame."""

import contextlib
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from modeling_2dmse import parse_ladder
from retrieval.planning import Cell
from run_scripts import plan
from run_scripts.benchmarks import growth
from run_scripts.comparing.methods import BEST, METHODS
from run_scripts.comparing.report import draw
from run_scripts.shared import plots
from run_scripts.shared.shares import save_shares
from run_scripts.training.classifying import draw as draw_classifier
from trainer.evaluation import grid_sizes

LADDER = parse_ladder(["1x8", "2x16", "4x32"])


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, drawn but not written."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: found.append(figure))
    monkeypatch.setattr(plots, "replacing", contextlib.nullcontext)
    return found


def texts(figure: Figure) -> list[Text]:
    """What is written in a drawn figure, except tick labels of numbers, some of which are never drawn."""
    FigureCanvasAgg(figure).draw()
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        found += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts, *axis.get_xticklabels()]
    return [text for text in found if text.get_text()]


def check_inside(figure: Figure) -> None:
    """No text leaves the picture."""
    assert len(texts(figure)) > 6
    for text in texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= figure.bbox.y1 + 1, text


def test_every_method_has_one_colour():
    assert set(METHODS) <= set(plots.COLORS)
    assert len({plots.COLORS[method] for method in METHODS}) == len(METHODS)
    assert plots.OURS == BEST
    ours, others = plots.line_style(BEST), [plots.line_style(method) for method in METHODS if method != BEST]
    assert all(ours["linewidth"] > other["linewidth"] and ours["zorder"] > other["zorder"] for other in others)


def test_the_picture_of_a_comparison(figures):
    scores = {
        method: {str(size): {0: 0.1 * i + 0.01 * n, 1: 0.1 * i} for n, size in enumerate(LADDER)}
        for i, method in enumerate(("matryoshka", BEST))
    }
    for some in (scores, {BEST: scores[BEST]}):
        draw(some, LADDER, "x.png", "org/" + "long-model-name-" * 9 + ", trained on nli", ["a", "b"])
    for figure in figures:
        (axis,) = figure.axes
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1x8", "2x16", "4x32"]
        assert "org/" in axis.get_title()
        assert axis.get_ylabel() == "Spearman, mean over a, b"
        assert to_hex(axis.containers[-1].lines[0].get_color()) == plots.COLORS[BEST]
        assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "best (ours)"
        check_inside(figure)


def test_the_heat_map(figures):
    sizes = grid_sizes(4, [8, 16, 32])
    scores = {str(size): size.num_layers + size.dim / 100 for size in sizes}
    results = {"model": "org/elastic-" + "with-a-long-name-" * 4, "sts": {"stsb": {"spearman": scores}}}
    results["retrieval"] = {"a-task-with-a-very-long-name-as-beir-has-them": {"ndcg@10": scores}}
    plots.save_heatmap(results, sizes, LADDER, "x.png")
    (figure,) = figures
    first, second, *bars = figure.axes
    assert len(bars) == 2
    for axis in (first, second):
        frames = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        middles = {(round(f.get_y() + f.get_height() / 2), round(f.get_x() + f.get_width() / 2)) for f in frames}
        assert middles == {(0, 0), (1, 1), (3, 2)}
        assert "org/elastic" in axis.get_title()
        assert [label.get_text() for label in axis.get_xticklabels()] == ["8", "16", "32"]
    check_inside(figure)
    plots.save_heatmap(results, sizes, [], "x.png")
    assert [axis.get_xlabel() for axis in figures[1].axes[:2]] == ["dimensions", "dimensions"]


def test_the_picture_of_a_plan(figures):
    cells = [Cell(f"{n}x384", float(n), 10.0, 1, 1.0, 1536.0, n / 20) for n in (1, 2, 12)]
    plan.draw([*cells, Cell("8x384", 8.0, 10.0, 1, 1.0, 1536.0, 0.01)], "x.png", "org/elastic")
    (figure,) = figures
    (axis,) = figure.axes
    assert axis.get_title() == "org/elastic"
    texts(figure)
    frame = axis.get_window_extent()
    assert all(
        text.get_window_extent().x1 <= frame.x1 and text.get_window_extent().y1 <= frame.y1 for text in axis.texts
    )
    colors = {to_hex(points.get_facecolor()[0]) for points in axis.collections}
    assert colors == {plots.COLORS["front"], plots.COLORS["other"]}


def test_the_picture_of_shares(figures):
    costs = {str(size): {"relative_time": size.num_layers / 4} for size in LADDER}
    scores = {"beir": {"ndcg@10": {str(size): 0.5 for size in LADDER}}}
    run = {"model": "out/beir", "corpus": "beir", "effort": "short", "costs": costs, "retrieval": scores}
    run["before"] = {"retrieval": scores}
    save_shares([run | {"base_model": "org/elastic"}], "x.png")
    save_shares([run | {"model": "out/elastic"}], "x.png")
    assert [figure.axes[0].get_title() for figure in figures] == ["org/elastic\nbeir", "out/elastic\nbeir"]
    for figure in figures:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["untouched", "short"]
        assert figure.axes[0].get_legend() is None, "no legend over the lines"
        check_inside(figure)
        *_, last = figure.axes[0].texts
        assert last.xyann == (0, 8), "above the lines that come to the full size from below"
    save_shares([run | {"effort": "fit"}], "x.png")
    assert to_hex(figures[-1].axes[0].lines[1].get_color()) == plots.COLORS["projections-refined"]


def test_the_picture_of_a_classifier(figures):
    sizes = [str(size) for size in LADDER]
    choice = {"expected_dim": 12, "mean_layers": 1.5, "accuracy": 0.8}
    results = {"model": "org/elastic", "accuracy": dict(zip(sizes, (0.5, 0.6, 0.9), strict=True)), "cascade": choice}
    draw_classifier(results, SimpleNamespace(ladder=LADDER, sizes=sizes, exits=[1, 2, 4]), "x.png")
    (figure,) = figures
    check_inside(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["8", "16", "32"]
    for axis in figure.axes:
        frame = axis.get_window_extent()
        assert all(text.get_window_extent().x1 < frame.x1 - 5 for text in axis.texts)
        assert all(text.get_window_extent().x0 > frame.x0 + 5 for text in axis.texts)


def test_the_picture_of_growth(figures):
    rows = [
        {"id": f"growth.{work}.{name}", "x": (32, 192, 256), "seconds": [1, 2, 3], "gb": [0.1, 0.2, 0.3]}
        for work in growth.WORK
        for name in ("length", "dims")
    ]
    growth.draw(rows, "x.png", "org/elastic")
    (figure,) = figures
    assert figure.get_suptitle() == "org/elastic"
    colors = {to_hex(line.get_color()) for axis in figure.axes for line in axis.lines}
    assert colors == {plots.COLORS[work] for work in growth.WORK}


def test_names_for_titles(tmp_path):
    (tmp_path / "elastic").mkdir()
    assert plots.public_name(str(tmp_path / "elastic") + "/") == "elastic"
    assert plots.public_name("org/elastic") == "org/elastic"
