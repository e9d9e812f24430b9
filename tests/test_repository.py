"""Rules of the house that a reader could break without noticing."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = sorted(path for path in ROOT.glob("modeling_*") if path.is_dir())


@pytest.mark.parametrize("path", [f for folder in ARCHITECTURES for f in folder.glob("*.py")], ids=lambda p: p.name)
def test_what_travels_to_the_hub_imports_torch_transformers_and_flat_neighbours(path):
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "safetensors"}  # transformers needs both
    tree = ast.parse(path.read_text())
    # transformers, too, takes what is imported inside `try` for optional.
    optional = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= allowed
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "a neighbour is imported as `from .name import X`"
            assert node.module is not None, "transformers does not copy what `from . import x` names"
            assert (path.parent / f"{node.module}.py").is_file()
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed


def test_pyproject_holds_the_build_system_alone():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^\[(.+)\]$", text, flags=re.M) == ["build-system"]


def test_constraints_pin_every_requirement():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    for extra in setup["options.extras_require"].values():
        required += extra.split()
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in required}
    assert names <= pinned


def test_ci_runs_the_readmes_test_line():
    readme = (ROOT / "README.md").read_text()
    line = 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert f"```\n{line}\n```" in readme or f"```bash\n{line}\n```" in readme
    assert line in (ROOT / ".ci" / "run").read_text()
    assert (
        'pip install -c constraints.txt -e ".[quickstart]" && accelerate launch --quiet run_scripts/finetune.py'
        in readme
    )


FOLDERS = ("modeling_*", "retrieval", "trainer", "run_scripts", "tests")
SOURCES = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


# A card begins with its metadata; beside cards stand the notes of experiments and the tables of comparisons.
CARDS = [
    path
    for path in sorted((ROOT / "model_cards").glob("*.md"))
    if path.name != "template.md" and path.read_text().startswith("---")
]


def test_there_are_cards():
    assert {"minilm-nli.md", "quickstart.md"} <= {path.name for path in CARDS}


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.name)
def test_committed_cards_are_valid(path):
    card = ModelCard.load(path)
    assert card.data.eval_results
    assert {result.metric_name.split()[0] for result in card.data.eval_results} <= {"Spearman", "nDCG@10"}
    assert "accelerate launch run_scripts/finetune.py" in card.text
    assert str(ROOT.parent) + "/" not in card.content


@pytest.mark.parametrize(
    ("name", "siblings"), [("backbone.py", ["mrl"]), ("pooling.py", ["mrl"]), ("running.py", ["mrl", "franca"])]
)
def test_what_two_architectures_need_is_one_file_copied(name, siblings):
    """A Hub folder must hold all that it needs, so that a sibling's file is copied, never changed."""
    for sibling in siblings:
        assert (ROOT / f"modeling_{sibling}" / name).read_bytes() == (ROOT / "modeling_2dmse" / name).read_bytes()


def test_no_two_test_files_share_a_name():
    """pytest imports them by their names alone."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert sorted(set(names)) == sorted(names)
