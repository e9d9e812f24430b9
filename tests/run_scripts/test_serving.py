"""The files of examples/serving: a server with OpenAI's contract, Triton's configuration, and a page in the browser."""

import base64
import functools
import http.server
import importlib.util
import os
import re
import threading
from pathlib import Path

import browser
import numpy as np
import pytest
from conftest import SENTENCES

from modeling_2dmse import TwoDMSEModel

SERVING = Path(__file__).resolve().parents[2] / "examples" / "serving"
SIZES = ["1x8", "2x16", "4x32"]
TEXTS = SENTENCES[:3]


@pytest.fixture(scope="module")
def folder(backbone_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "elastic"
    prompts = {"query": "a man plays "}
    TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=SIZES, prompts=prompts).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return TwoDMSEModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(folder):
    pytest.importorskip("fastapi", reason="needs fastapi")
    from fastapi.testclient import TestClient

    os.environ["MODEL"] = str(folder)
    try:
        spec = importlib.util.spec_from_file_location("fastapi_server", SERVING / "fastapi_server.py")
        server = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(server)
    finally:
        del os.environ["MODEL"]
    return TestClient(server.app)


def ask(client, **body):
    return client.post("/v1/embeddings", json={"model": "elastic", **body})


def test_a_request_names_its_size(client, model):
    for size in ({}, {"dimensions": 8}, {"num_layers": 2}, {"num_layers": 1, "dimensions": 16}):
        answer = ask(client, input=TEXTS, **size).json()
        assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", i) for i in range(3)]
        expected = model.encode(TEXTS, size.get("num_layers"), size.get("dimensions"))
        np.testing.assert_allclose([row["embedding"] for row in answer["data"]], expected, atol=1e-6)
        assert (answer["object"], answer["model"]) == ("list", "elastic")
        tokens = sum(len(text.split()) + 2 for text in TEXTS)
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_one_text_base64_and_a_prompt(client, model):
    (row,) = ask(client, input=TEXTS[0], encoding_format="base64", prompt_name="query").json()["data"]
    vector = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    np.testing.assert_allclose(vector, model.encode(TEXTS[0], prompt_name="query"), atol=1e-6)
    assert not np.allclose(vector, model.encode(TEXTS[0]), atol=1e-3)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"input": "a", "dimensions": 33}, 400, "dimensions", "dimensions: 33 is not allowed; this model has 1 to 32"),
        ({"input": "a", "num_layers": 5}, 400, "num_layers", "num_layers: 5 is not allowed; this model has 1 to 4"),
        ({"input": "a", "prompt_name": "x"}, 400, "prompt_name", "prompt_name: 'x' is unknown"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"input": []}, 400, "input", "input: "),
        ({"input": ""}, 400, "input", "input: "),
        ({"input": ["a", ""]}, 400, "input", "input: "),
        ({}, 400, "input", "input: Field required"),
        ({"input": "a", "model": "gpt"}, 404, "model", "the model 'gpt' does not exist; this server has 'elastic'"),
    ],
)
def test_errors_are_those_of_openai(client, body, status, param, message):
    answer = ask(client, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert error["code"] == ("model_not_found" if status == 404 else None)


def test_the_client_of_openai(client, model):
    openai = pytest.importorskip("openai", reason="needs openai")
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
    assert [served.id for served in api.models.list()] == ["elastic"]
    answer = api.embeddings.create(model="elastic", input=TEXTS, dimensions=16, extra_body={"num_layers": 2})
    np.testing.assert_allclose([row.embedding for row in answer.data], model.encode(TEXTS, 2, 16), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions: 99 is not allowed") as caught:
        api.embeddings.create(model="elastic", input="a", dimensions=99)
    assert caught.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.embeddings.create(model="other", input="a")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}")
    path = tmp_path_factory.mktemp("exported") / "model"
    model.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's
    model.export(str(path), num_layers=2, dim=16, format="onnx")
    return path


def test_tritons_configuration_names_the_tensors_of_the_export(exported):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    text = re.sub(r"#.*", "", (SERVING / "triton" / "embedder" / "config.pbtxt").read_text())
    inputs, outputs = text.split("output [")
    tensor = re.compile(r'name: "(\w+)" data_type: (\w+) dims: \[ (-?\d+) \]')
    assert tensor.findall(outputs) == [("sentence_embedding", "TYPE_FP32", "64")]
    assert {name: kind for name, kind, _ in tensor.findall(inputs)} == {
        tensor.name: types[tensor.type] for tensor in session.get_inputs()
    }
    (output,) = [tensor for tensor in session.get_outputs() if tensor.name == "sentence_embedding"]
    assert (types[output.type], output.shape[1]) == ("TYPE_FP32", 16)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_):
        pass


@pytest.fixture
def site(exported, tmp_path):
    """The address of a server of the page, the libraries and the model."""
    folders = (SERVING / "browser" / "node_modules", SERVING.parents[1] / "out" / "js" / "node_modules")
    modules = next((path for path in folders if (path / "@huggingface" / "transformers").is_dir()), None)
    if modules is None:
        pytest.skip("needs transformers.js: npm install --prefix out/js @huggingface/transformers")
    for name, path in {"index.html": SERVING / "browser" / "index.html", "node_modules": modules}.items():
        (tmp_path / name).symlink_to(path)
    (tmp_path / "model").symlink_to(exported)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "nothing is missing")
def test_an_export_in_the_browser(site, model):
    browser.SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with browser.open_page(viewport={"width": 900, "height": 640}) as tab:
        tab.goto(site)
        tab.locator("#results li").nth(2).wait_for()
        vectors = np.array(tab.evaluate("texts => window.embed(texts)", TEXTS))
        np.testing.assert_allclose(vectors, model.encode(TEXTS, 2, 16), atol=1e-4)
        before = tab.locator("#results").inner_text()
        tab.fill("#query", SENTENCES[14])
        tab.press("#query", "Enter")
        tab.wait_for_function("text => document.querySelector('#results').innerText !== text", arg=before)
        assert tab.locator("#results li").first.inner_text().startswith("a cat sleeps on the warm roof")
        assert "16 dimensions, 4 texts" in tab.locator("#status").inner_text()
        tab.screenshot(path=browser.SCREENSHOTS / "browser-page.png")
        assert (tab.errors, tab.outside) == ([], [])
