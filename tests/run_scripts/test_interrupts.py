"""Ctrl-C and SIGTERM end every script in one line, keep earlier outputs, and the run can be repeated."""

import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import SENTENCES, cpu_environment
from datasets import Dataset

from retrieval import FunnelIndex
from run_scripts import evaluate, finetune, mine_negatives
from run_scripts.shared import interrupts
from run_scripts.training import finetuning
from trainer import evaluation

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "run_scripts").glob("*.py") if path.name != "__init__.py")


def interrupted(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import run_scripts.shared, sys; sys.argv = ['a/encode.py']; {code}"]
    return subprocess.run(command, env=cpu_environment(ROOT), capture_output=True, text=True, check=False)


def test_one_line_and_the_exit_code_of_ctrl_c():
    done = interrupted("raise KeyboardInterrupt")
    # A shell shows 130 for a process that SIGINT has ended.
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "encode.py: stopped by Ctrl-C\n")
    done = interrupted("raise KeyboardInterrupt('nothing was written')")
    assert done.stderr == "encode.py: stopped by Ctrl-C; nothing was written\n"
    done = interrupted("import os; os.environ['RANK'] = '1'; raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    done = interrupted("1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr, "an error of the program keeps its traceback"


def test_ctrl_c_is_not_lost_in_a_callback():
    lost = "import os, signal, time, weakref; A = type('A', (), {}); a = A(); kill = lambda _: os.kill(os.getpid(), 2)"
    done = interrupted(f"{lost}; r = weakref.ref(a, kill); del a; time.sleep(60); print('went on')")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")
    assert done.stderr == "encode.py: stopped by Ctrl-C\n"


def test_sigterm_ends_with_one_line_too():
    kill = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60); print('went on')"
    done = interrupted(f"import os, signal, time; {kill}")
    # A shell shows 143 for a process that SIGTERM has ended.
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
    assert done.stderr == "encode.py: stopped by SIGTERM\n"
    # Pools end their workers so.
    forked = f"import os, signal, time\nif not os.fork(): {kill}\nprint(os.wait()[1])"
    done = interrupted(forked)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signal.SIGTERM)}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_without_a_line(unbuffered):
    code = "import run_scripts.shared\nfrom run_scripts.shared import cli\nwith cli.user_errors(): input(), print('a')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=cpu_environment(ROOT, PYTHONUNBUFFERED=unbuffered),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    # As of any command before `| head`.
    assert (process.stderr.read(), process.wait()) == ("", -signal.SIGPIPE)


def test_every_script_ends_so():
    assert len(SCRIPTS) > 15
    assert [path.name for path in SCRIPTS if "\nfrom run_scripts.shared" not in path.read_text()] == []


@pytest.fixture
def start(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    pairs = {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}
    Dataset.from_dict(pairs).to_csv(tmp_path / "pairs.csv")
    scored = {"sentence1": SENTENCES[::2], "sentence2": SENTENCES[1::2], "score": [float(i) for i in range(10)]}
    Dataset.from_dict(scored).to_csv(tmp_path / "scored.csv")
    return tmp_path


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt, interrupts.Terminated])
def test_a_training_that_has_not_begun_writes_nothing(error, start, monkeypatch):
    def stop(*args):
        raise error

    monkeypatch.setattr(finetuning, "make_trainer", stop)
    flags = ["--model_name_or_path", str(start / "model"), "--train_file", str(start / "pairs.csv"), "--report_to"]
    with pytest.raises(KeyboardInterrupt, match="nothing was written") as stopped:
        finetune.main([*flags, "none", "--output_dir", str(start / "out"), "--use_cpu", "true", "--bf16", "false"])
    assert type(stopped.value) is error
    assert not (start / "out").exists()


def test_earlier_results_are_kept(start, monkeypatch):
    flags = ["--model_name_or_path", str(start / "model"), "--sts_files", str(start / "scored.csv"), "--output_dir"]
    evaluate.main([*flags, str(start / "out")])
    before = {path: path.read_bytes() for path in (start / "out").iterdir()}
    monkeypatch.setattr(evaluation, "evaluate_tasks", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*flags, str(start / "out"), "--overwrite"])
    assert {path: path.read_bytes() for path in (start / "out").iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_earlier_negatives_are_kept(error, start, monkeypatch, capsys):
    def fail(self, file, **kwargs):
        file.write(b"half a ta")
        raise error

    (start / "out.csv").write_text("precious")
    flags = ["--model_name_or_path", str(start / "model"), "--train_file", str(start / "pairs.csv"), "--overwrite"]
    monkeypatch.setattr(datasets.Dataset, "to_csv", fail)
    with pytest.raises(SystemExit if error is OSError else KeyboardInterrupt):
        mine_negatives.main([*flags, "--output_file", str(start / "out.csv"), "--range_min", "0", "--range_max", "5"])
    assert (start / "out.csv").read_text() == "precious"
    assert not (start / "out.csv.partial").exists()


def test_an_earlier_index_is_kept(tmp_path):
    def blocks():
        yield vectors
        raise KeyboardInterrupt

    vectors = np.ones((1, 2), np.float32)
    FunnelIndex.build(vectors, tmp_path / "index", texts=["first"])
    with pytest.raises(KeyboardInterrupt):
        FunnelIndex.build(blocks(), tmp_path / "index", overwrite=True)
    assert FunnelIndex.open(tmp_path / "index").text(0) == "first"
    FunnelIndex.build(vectors, tmp_path / "index", texts=["second"], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
