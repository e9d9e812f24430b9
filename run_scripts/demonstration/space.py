"""The demo as a Space of the Hugging Face Hub: a folder that runs without this project."""

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainer.shared import hub

from .engine import Document

FILES = ("engine.py", "heat_map.py", "page.py", "picker.js", "style.css", "views.py")
# Gradio itself is named in the head of the README.
_LIBRARIES = ("numpy", "torch", "transformers")
_APP = '''"""The demo of an elastic encoder, see README.md."""

import json
import os
from pathlib import Path

from demo import page
from demo.engine import Document, SizedCorpus
from transformers import AutoModel

FOLDER = Path(__file__).parent
SETTINGS = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
name = SETTINGS["model"] or str(FOLDER / "model")
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
lines = (FOLDER / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
documents = [Document(**json.loads(line)) for line in lines]
corpus = SizedCorpus(model, documents, SETTINGS["layers"], SETTINGS["dims"])
demo = page.build(corpus, SETTINGS["name"], SETTINGS["source"], SETTINGS["examples"])

if __name__ == "__main__":
    demo.launch(**page.launch_options(), server_port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
'''
_README = """---
{head}---

# {name} at any size

A search and a comparison of sentences at every number of layers and dimensions of `{name}`, beside its full size.
The {count:,} documents are from {source}, and are embedded once when the Space starts.
"""


def stage_space(
    target: str,
    model: str,
    sizes: tuple[Sequence[int], Sequence[int]],
    documents: Sequence[Document],
    source: str,
    examples: Sequence[str],
) -> list[str]:
    """Write the files of a Space.

    Args:
        target: a folder that is empty or does not exist.
        model: a folder of a saved elastic model, which is copied into the Space, or its name on the Hub.
        sizes: the layers and the dimensions that can be chosen.
        documents: the corpus.
        source: what the documents are.
        examples: queries to try.

    Returns:
        the paths of the files inside `target`, sorted.

    Raises:
        ValueError: `target` is not allowed, the model folder cannot be published (see `trainer.shared.hub.stage`), or
            gradio is missing.
    """
    version = gradio_version()
    hub.check_target(target)
    local = os.path.isdir(model)
    name = os.path.basename(os.path.normpath(model)) if local else model
    if local:
        hub.stage(model, name, os.path.join(target, "model"))
    folder = Path(target)
    (folder / "demo").mkdir(parents=True, exist_ok=True)
    (folder / "demo" / "__init__.py").write_text("", encoding="utf-8")
    for file in FILES:
        shutil.copyfile(Path(__file__).parent / file, folder / "demo" / file)
    settings = {"model": None if local else model, "name": name, "layers": list(sizes[0]), "dims": list(sizes[1])}
    settings |= {"source": source, "examples": list(examples)}
    corpus = "".join(json.dumps({"title": d.title, "text": d.text}) + "\n" for d in documents)
    head = yaml.safe_dump(_head(name, version, local), sort_keys=False, allow_unicode=True)
    written = {
        "app.py": _APP,
        "settings.json": json.dumps(settings, indent=2) + "\n",
        "corpus.jsonl": corpus,
        "requirements.txt": "\n".join(_requirements()) + "\n",
        "README.md": _README.format(head=head, name=name, count=len(documents), source=source),
    }
    for path, text in written.items():
        (folder / path).write_text(text, encoding="utf-8")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def gradio_version() -> str:
    """The installed version of gradio; ValueError if it is missing."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError('demo: gradio is missing; pip install "twodmse[demo]"') from error


def _head(name: str, version: str, local: bool) -> dict:
    """The settings that the Hub reads from the README's head."""
    head = {
        "title": f"{name.rpartition('/')[2]} at any size",
        "colorFrom": "indigo",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": version,
        "python_version": "3.11",
        "app_file": "app.py",
        "short_description": "Search at any number of layers and dimensions",
    }
    return head if local else head | {"models": [name]}


def _requirements() -> list[str]:
    """The lowest versions of the libraries that the Space needs, as this project requires them."""
    wanted = [re.match(r"([\w-]+)([^;\s]*)", line) for line in importlib.metadata.requires("twodmse") or []]
    return sorted({match[0] for match in wanted if match and match[1] in _LIBRARIES})
