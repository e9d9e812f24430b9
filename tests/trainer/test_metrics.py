"""The library `evaluate` is imported by one file: run_scripts/evaluate.py would be found under its name in a script."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("examples", "model_cards", "modeling_*", "retrieval", "run_scripts", "tests", "trainer", "twodmse")


def imports_evaluate(source: str) -> bool:
    """Whether a file imports the module `evaluate` or something from it, by its absolute name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return any(name.split(".")[0] == "evaluate" for name in names)


def test_one_file_imports_evaluate():
    files = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(files) > 150
    found = [path for path in files if imports_evaluate(path.read_text(encoding="utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["trainer/metrics.py"]


def test_every_form_of_the_import_is_found():
    assert imports_evaluate("def f():\n    import evaluate.loading as e")
    assert imports_evaluate("from evaluate import Metric")
    assert not imports_evaluate(
        "from run_scripts import evaluate\nfrom .evaluate import x\nimport run_scripts.evaluate"
    )
