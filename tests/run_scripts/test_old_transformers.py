"""With transformers 4, every command ends with one line that says what is needed, and so does each architecture."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import cpu_environment

ROOT = Path(__file__).resolve().parents[2]
LINE = "need transformers 5 or newer, not 4.57.0; upgrade transformers"
# The names that the packages import from transformers before their check, and none that is new in version 5.
STUB = """
__version__ = "4.57.0"
class AutoConfig: ...
AutoModel = AutoModelForPreTraining = AutoModelForImageClassification = AutoModelForSequenceClassification = AutoConfig
AutoModelForImageTextToText = AutoProcessor = LlavaConfig = AutoConfig
"""
RUNNER = """
import contextlib, importlib, io, json, runpy, sys
outcomes = {}
def run(name, start):
    err, code = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(err):
            start()
    except (SystemExit, ImportError) as stopped:
        code = getattr(stopped, "code", str(stopped))
    outcomes[name] = [code, err.getvalue()]
for script in sys.argv[1].split():
    sys.argv[0] = script.rpartition("/")[2]
    run(script, lambda: runpy.run_path(script, run_name="__main__"))
main = importlib.import_module("twodmse.__main__")
for command in main.COMMANDS:
    sys.argv[1:] = [command, "--help"]
    run(f"twodmse {command}", main.main)
for name in ["modeling_2dmse", "modeling_mrl", "modeling_m3", "modeling_franca"]:
    run(name, lambda: importlib.import_module(name))
print(json.dumps(outcomes))
"""


def test_every_command_names_the_version_that_it_needs(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(STUB)
    scripts = [str(path) for path in (ROOT / "run_scripts").glob("*.py") if path.stem != "__init__"]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, " ".join(scripts)],
        cwd=tmp_path,
        env=cpu_environment(tmp_path, ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 2 * len(scripts) - 5
    for name, (code, shown) in outcomes.items():
        if name.startswith("modeling_"):
            assert (code.partition(" models ")[2], shown) == (LINE, ""), name
        else:
            command = name if name.startswith("twodmse ") else Path(name).name
            assert (code, shown) == (2, f"{command}: error: 2DMSE models {LINE}\n"), name
