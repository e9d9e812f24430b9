"""What an import of the packages loads: loading a model or searching an index needs no data sets, adapters or plots."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cpu_environment

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("datasets", "peft", "evaluate", "matplotlib")
MODELS = ("modeling_2dmse", "modeling_mrl", "modeling_m3", "modeling_franca")


def loaded(statements: str, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that a fresh process has loaded after running the statements."""
    code = f"{statements}\nimport sys\nprint('loaded:', *(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=cpu_environment(ROOT), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_models_load_nothing_heavy():
    assert all(importlib.util.find_spec(name) for name in HEAVY), "what is not installed cannot be loaded"
    statements = "\n".join(f"import {name}" for name in MODELS)
    assert loaded(statements, (*HEAVY, "transformers", *MODELS)) == ["transformers", *MODELS]


@pytest.mark.parametrize(
    "statement",
    ["import retrieval", "import retrieval.planning, retrieval.shards", "import retrieval.engines, retrieval.qdrant"],
)
def test_retrieval_needs_no_torch_and_no_client(statement):
    clients = ("qdrant_client", "psycopg", "pgvector")
    assert loaded(statement, (*HEAVY, *clients, "torch", "transformers", "numpy")) == ["numpy"]


def test_the_namespace_loads_a_name_when_it_is_used():
    names = (*HEAVY, "torch", "transformers", "numpy", "retrieval", *MODELS, "trainer")
    assert loaded("import twodmse", names) == []
    assert loaded("from twodmse import FunnelIndex, __version__", names) == ["numpy", "retrieval"]
