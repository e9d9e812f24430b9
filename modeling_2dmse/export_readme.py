"""The README.md of an exported size: what it is, the line to use it, and what clients make of it."""

import os
import re

import torch
import transformers
from transformers.utils import cached_file

_SENTENCE_TRANSFORMERS = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{options})
model.encode(["a text"])  # (1, {dim})
```"""

_ONNXRUNTIME = """With onnxruntime and the tokenizer:

```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
session = onnxruntime.InferenceSession("{name}/{file}")
tokens = tokenizer(["a text"], padding=True, truncation=True, return_tensors="np")
vectors = session.run(["sentence_embedding"], dict(tokens))[0]  # (1, {dim})
```

With transformers.js:

```js
import {{ AutoModel, AutoTokenizer }} from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("{name}");
const model = await AutoModel.from_pretrained("{name}", {{ dtype: "{js_dtype}" }});
const tokens = await tokenizer(["a text"], {{ padding: true, truncation: true }});
const {{ sentence_embedding }} = await model(tokens); // (1, {dim})
```"""

_PROMPTS = "Prompts (`prompt_name`; clients other than sentence-transformers have to put them before the texts):"


def write_export_readme(folder: str, name: str, model, format: str, dtype: str) -> None:
    """Write the README.md of an export.

    Args:
        folder: where the file goes.
        name: of the folder, in the lines to use it.
        model: the `TwoDMSEModel` of the size.
        format: `transformers` or `onnx`.
        dtype: type of the weights.
    """
    config, source, license = model.config, _source(model), _license(model)
    layers = "1 layer" if model.num_layers == 1 else f"{model.num_layers} layers"
    weighed = "weighed by a gate, " if model.is_gated else ""
    length = "have unit length and are compared by cosine"
    if config.similarity == "dot":
        length = "are compared by dot product; they do not have unit length"
    tags = ["sentence-transformers", "feature-extraction", *(["onnx", "transformers.js"] if format == "onnx" else [])]
    head = [f"license: {license}"] if license else []
    head += ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    licence = f"{license}, as {source} states." if license else f"{source} states none; its own licence holds."
    prompts = "\n".join(f"- {note}" for note in config.prompt_notes)
    parts = [
        "\n".join(["---", *head, *(f"- {tag}" for tag in tags), "---"]),
        f"# {name}",
        f"A sentence encoder of size {model.num_layers}x{config.dim} ({layers}, {config.dim} "
        f"dimensions), cut out of {source}; {format}, {dtype}. Texts are cut to {model.max_length} tokens, token "
        f"states are {weighed}pooled by `{config.pooling}`, and vectors {length}.",
        f"## Use\n\n{_usage(name, config.dim, format, dtype)}",
        *([f"{_PROMPTS}\n\n{prompts}"] if prompts else []),
        f"## Other clients\n\n{_clients(model, format)}",
        f"## Licence\n\n{licence}",
        f"Made with transformers {transformers.__version__} and torch {torch.__version__}.",
    ]
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write("\n\n".join(parts) + "\n")


def _usage(name: str, dim: int, format: str, dtype: str) -> str:
    if format != "onnx":
        return _SENTENCE_TRANSFORMERS.format(name=name, dim=dim, options="")
    file, js_dtype, options = "onnx/model.onnx", "fp32", ', backend="onnx"'
    if dtype == "int8":
        file, js_dtype = "onnx/model_quantized.onnx", "q8"
        options += f', model_kwargs={{"file_name": "{file}"}}'
    first = _SENTENCE_TRANSFORMERS.format(name=name, dim=dim, options=options)
    return f"{first}\n\n{_ONNXRUNTIME.format(name=name, dim=dim, file=file, js_dtype=js_dtype)}"


def _clients(model, format: str) -> str:
    config = model.config
    if format == "onnx":
        done = "weighed, projected and cut" if model.is_gated else "projected and cut"
        return (
            f"`last_hidden_state` is {done} to {config.dim} dimensions already. Clients that pool it "
            "themselves (transformers.js' `pipeline`, fastembed, optimum) get the same vectors if they are set to pool "
            f"by `{config.pooling}` and to normalise. `config.json` has the width of the layers, {config.hidden_size}."
        )
    if model.exit_projections is None and config.dim == config.hidden_size:
        return (
            "Clients that read only the backbone and pool its states themselves get the same vectors if they are set "
            f"to pool by `{config.pooling}` and to normalise."
        )
    kept = f"the first {config.dim}, normalised, are this model's"
    if model.exit_projections is not None:
        kept = "without the projection in that folder, they are not this model's vectors"
    return (
        "Clients that read only the backbone and pool its states themselves (txtai's default, semantic-router) ignore "
        f"`2_Dense`: their vectors are uncut and have {config.hidden_size} dimensions instead of {config.dim}; {kept}."
    )


def _source(model) -> str:
    """The name of the model that was cut, without the folders of this machine."""
    name = str(model.config.name_or_path)
    is_local = os.path.isabs(name) or os.path.isdir(name)
    return (os.path.basename(os.path.normpath(name)) if is_local else name) or "a model without a name"


def _license(model) -> str | None:
    """The licence in the head of the model's own README.md, if it has one."""
    path = _card(str(model.config.name_or_path))
    if path is None or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        head = re.match(r"---\n(.*?)\n---", file.read(), re.DOTALL)
    found = re.search(r"^license: *[\"']?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _card(name: str) -> str | None:
    """Where the README.md of a folder or repository is on this machine."""
    if not name or os.path.isdir(name):
        return os.path.join(name, "README.md") if name else None
    try:
        return cached_file(
            name,
            "README.md",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # the folder has been moved
        return None
