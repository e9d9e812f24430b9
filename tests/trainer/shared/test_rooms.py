"""The rooms of `trainer/`: siblings import `trainer/shared` and the models, not each other or the encoder's trainer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SIBLINGS = ("franca", "m3", "mrl", "smae")
ENCODER = ("trainer.losses", "trainer.objectives", "trainer.trainer")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file of this project imports, anywhere in it."""
    package = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    return names


def forbidden(names: set[str], allowed: tuple[str, ...]) -> list[str]:
    """The modules of `trainer` among the names that are neither `trainer` itself nor in an allowed package."""
    of_trainer = {name for name in names if name.startswith("trainer.")}
    return sorted(name for name in of_trainer if not any(f"{name}.".startswith(f"{room}.") for room in allowed))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_sibling_imports_only_its_own_folder_and_shared(sibling):
    files = sorted((ROOT / "trainer" / sibling).rglob("*.py"))
    assert len(files) >= 4
    own = (f"trainer.{sibling}", "trainer.shared")
    assert {path.name: forbidden(imported(path), own) for path in files} == {path.name: [] for path in files}
    assert any("trainer.shared.checkpoints" in imported(path) for path in files), "relative imports are resolved"


def test_shared_imports_no_other_folder():
    for path in sorted((ROOT / "trainer" / "shared").rglob("*.py")):
        assert forbidden(imported(path), ("trainer.shared",)) == [], path.name


def test_a_forbidden_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_rooms.ROOT", tmp_path)
    path = tmp_path / "trainer" / "smae" / "trainer.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..shared.tables import x\nfrom .masking import y\nfrom .. import objectives\nimport trainer.m3\n"
    )
    assert forbidden(imported(path), ("trainer.smae", "trainer.shared")) == ["trainer.m3", "trainer.objectives"]


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_loading_a_siblings_trainer_loads_neither_the_encoders_nor_another_sibling(sibling):
    code = (
        f"import sys, trainer.{sibling}.trainer; print(*(name for name in sys.modules if name.startswith('trainer')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {f"trainer.{sibling}.trainer", "trainer.shared.checkpoints"} <= loaded
    assert not loaded.intersection(ENCODER)
    assert not [
        name for name in loaded for other in SIBLINGS if other != sibling and name.startswith(f"trainer.{other}")
    ]
