"""Rules of the house that a reader could break without noticing."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = sorted(path for path in ROOT.glob("modeling_*") if path.is_dir())


@pytest.mark.parametrize("path", [f for folder in ARCHITECTURES for f in folder.glob("*.py")], ids=lambda p: p.name)
def test_what_travels_to_the_hub_imports_torch_transformers_and_flat_neighbours(path):
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "safetensors"}  # transformers needs both
    for node in ast.walk(ast.parse(path.read_text())):
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
    assert 'pip install -c constraints.txt -e ".[quickstart]" && accelerate launch run_scripts/finetune.py' in readme


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts], ids=lambda p: p.name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 410
