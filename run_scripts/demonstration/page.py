"""The demo's page: a search at any size beside the full size, and two sentences compared at every size."""

import os
from html import escape
from pathlib import Path

# Read when gradio is imported: nothing is sent anywhere.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import numpy as np

from . import views
from .engine import NEIGHBOURS, PROBES, SizedCorpus
from .heat_map import Map, table

_FOLDER = Path(__file__).parent
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}
TITLE = "One encoder, any size"
SENTENCES = ("Return the largest item of a list.", "Find the maximum in a sequence.")


def theme() -> gr.themes.Base:
    """One accent on grey, in the fonts of the reader's system: no font is fetched."""
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="sm", font=list(sans), font_mono=list(mono)
    )


def launch_options() -> dict:
    """What `Blocks.launch` needs so that the page looks as it should and fetches nothing from elsewhere."""
    return {
        "theme": theme(),
        "css": (_FOLDER / "style.css").read_text(encoding="utf-8"),
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "share": False,
    }


def build(corpus: SizedCorpus, name: str, source: str, examples: list[str], k: int = 10, note: str = "") -> gr.Blocks:
    """The page.

    Args:
        corpus: what is searched.
        name: of the model.
        source: what the documents are.
        examples: queries to try; the first one is shown at the start.
        k: results per query.
        note: a sentence on the model.
    """
    num_layers, dim = corpus.full
    about = f"{name}: {num_layers} layers, {dim} dimensions. {len(corpus.documents):,} documents from {source}. {note}"
    with gr.Blocks(title=f"{TITLE}: {name}", analytics_enabled=False) as page:
        gr.HTML(f'<header class="top"><h1>{TITLE}</h1><p>{escape(about)}</p></header>', js_on_load=None)
        with gr.Tab("Search"):
            _search_tab(corpus, examples, k)
        with gr.Tab("Two sentences"):
            _sentences_tab(corpus)
    return page


def _search_tab(corpus: SizedCorpus, examples: list[str], k: int) -> None:
    layers, dims = corpus.layers, corpus.dims
    start = (layers[(len(layers) - 1) // 2], dims[(len(dims) - 1) // 2])

    def search(query: str, size: tuple[int, int]) -> str:
        if not query.strip():
            return views.message("Type a query to search the documents.")
        chosen = corpus.search(query, *size)
        full = chosen if tuple(size) == corpus.full else corpus.search(query, *corpus.full)
        return views.results(chosen, full, corpus.documents, k)

    def choose(query: str, event: gr.EventData) -> tuple[tuple[int, int], str]:
        size = (int(event.layers), int(event.dim))
        if size[0] not in layers or size[1] not in dims:
            raise gr.Error(f"{size[0]}x{size[1]} is not a size of this model")
        return size, search(query, size)

    size = gr.State(start)
    query = gr.Textbox(
        examples[0], placeholder="Describe what you look for", label="Query", show_label=False, container=False,
        elem_id="query", max_lines=1,
    )  # fmt: skip
    with gr.Row(elem_id="workspace"):
        script = (_FOLDER / "picker.js").read_text(encoding="utf-8")
        picker = gr.HTML(_picker(corpus, start), js_on_load=script, elem_id="picker")
        found = gr.HTML(search(examples[0], start), js_on_load=None, elem_id="found")
    gr.Examples(examples, query, label="Try")
    gr.on([query.submit, query.change], search, [query, size], found, trigger_mode="always_last", **_QUIET)
    picker.select(choose, query, [size, found], trigger_mode="always_last", **_QUIET)


def _sentences_tab(corpus: SizedCorpus) -> None:
    def compare(first: str, second: str) -> str:
        if not (first.strip() and second.strip()):
            return views.message("Type two sentences to compare them.")
        map_ = _similarity_map(corpus.similarities(first, second))
        return views.similarities(map_, corpus.layers, corpus.dims)

    with gr.Row():
        first = gr.Textbox(SENTENCES[0], label="First sentence", elem_id="first", max_lines=2, min_width=280)
        second = gr.Textbox(SENTENCES[1], label="Second sentence", elem_id="second", max_lines=2, min_width=280)
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    compared = gr.HTML(compare(*SENTENCES), js_on_load=None, elem_id="compared")
    gr.on([button.click, first.submit, second.submit], compare, [first, second], compared, **_QUIET)


def _similarity_map(values) -> Map:
    return Map("Similarity", "", values, "{:.3f}".format, lowest=min(0.0, values.min()), highest=max(1.0, values.max()))


def _picker(corpus: SizedCorpus, start: tuple[int, int]) -> str:
    """Two sliders with a stop per layer and dimension that the model offers, and heat maps of which a cell can be
    pressed."""
    layers, dims = corpus.layers, corpus.dims
    megabytes = [[corpus.index_mb(dim) for dim in dims] for _ in layers]
    maps = [
        Map(
            "Agreement",
            f"Share (%) of the {NEIGHBOURS} nearest documents that a size has in common with the full size, "
            f"mean over {min(PROBES, len(corpus.documents))} documents.",
            100 * corpus.agreement(),
            "{:.0f}".format,
            highest=100,
        ),
        Map("Query ms", "Milliseconds to embed a short query on this machine.", corpus.query_ms(), "{:.1f}".format),
        Map("Index MB", "Megabytes of all vectors in float32.", np.array(megabytes), "{:.2f}".format),
    ]
    sliders = _slider("layers", "Layers", layers, start[0]) + _slider("dim", "Dimensions", dims, start[1])
    tabs = "".join(
        f'<button type="button" data-map="{i}" aria-pressed="{str(i == 0).lower()}">{map_.name}</button>'
        for i, map_ in enumerate(maps)
    )
    tables = "".join(
        f'<div data-shown="{i}"{" hidden" * (i > 0)}>{table(map_, layers, dims, buttons=True)}<p>{map_.note}</p></div>'
        for i, map_ in enumerate(maps)
    )
    return (
        f'<div class="picker">{sliders}<div class="kinds" role="group" aria-label="Heat map">{tabs}</div>{tables}</div>'
    )


def _slider(name: str, label: str, stops: list[int], value: int) -> str:
    """A slider over the positions of `stops`."""
    scale = f'min="0" max="{len(stops) - 1}" step="1" value="{stops.index(value)}"'
    return (
        f'<label class="slider"><span>{label}</span><output>{value}</output>'
        f'<input type="range" name="{name}" {scale} data-stops="{",".join(map(str, stops))}"></label>'
    )
