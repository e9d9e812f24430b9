"""Scripts answer --help and refuse wrong input before they load the libraries that take seconds."""

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from modeling_2dmse import export, parse_ladder, parse_size
from modeling_2dmse.configuration_2dmse import POOLING_MODES
from modeling_2dmse.formats import PRECISIONS
from modeling_franca import rasa
from retrieval.planning import BYTES
from run_scripts import benchmark
from run_scripts.benchmarks import registry
from run_scripts.shared import checks, cli, early
from run_scripts.shared.model_folder import read_shape
from trainer.shared import headings
from trainer.shared.tables import FORMATS, read_table
from twodmse.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
# The training scripts need transformers' TrainingArguments, and so torch, to know their flags.
TRAINING = ("classify", "elasticize", "finetune", "pretrain", "pretrain_franca", "train_m3")
SCRIPTS = sorted(path.stem for path in (ROOT / "run_scripts").glob("*.py") if path.stem not in ("__init__", *TRAINING))
NEVER_YET = {"datasets", "matplotlib", "sentence_transformers", "peft", "evaluate"}
NOT_YET = {*NEVER_YET, "torch", "scipy", "pandas", "accelerate", "modeling_2dmse", "modeling_franca", "modeling_m3"}
# A script must start within 3 s on an idle machine; the rest is for a machine with other work.
LIMIT = 30

MODEL = ("--model_name_or_path", "./absent")
OUT = ("--output_dir", "out")
WRONG = {
    "benchmark: name": ("benchmark", ["nothing"], "benchmark: 'nothing' is unknown"),
    "benchmark: model": ("benchmark", ["grid", *MODEL], "model_name_or_path: ./absent does not exist"),
    "benchmark: sizes": ("benchmark", ["grid", "--sizes", "6"], "sizes: '6' is not a size; write LAYERSxDIM"),
    "compare: method": (
        "compare",
        ["--eval_file", "x", "--sts_files", "x", "--methods", "y"],
        "methods: 'y' is unknown",
    ),
    "demo: model": ("demo", [*MODEL], "model_name_or_path: ./absent does not exist"),
    "demo: corpus": ("demo", ["--corpus_file", "x.txt"], "corpus_file: x.txt is not a file"),
    "encode: model": ("encode", [*MODEL, *OUT, "--input", "-"], "model_name_or_path: ./absent does not exist"),
    "encode: precision": ("encode", [*MODEL, *OUT, "--input", "x", "--precision", "int4"], "precision: 'int4' is unk"),
    "encode: name": (
        "encode",
        ["--model_name_or_path", "models/absent", *OUT, "--input", "-"],
        "model_name_or_path: models/absent is not a folder, and the Hub cannot be asked for it",
    ),
    "encode: input": ("encode", ["--model_name_or_path", "a", *OUT, "--input", "x.txt"], "input: x.txt is not a file"),
    "encode: part": (
        "encode",
        [*MODEL, *OUT, "--input", "x", "--part", "0/4"],
        "part: '0/4' is not allowed; write",
    ),
    "encode: cluster": ("encode", [*MODEL, *OUT, "--input", "x", "--ray_address", "a:1"], "ray_address: only --engine"),
    "evaluate: file": ("evaluate", [*MODEL, *OUT, "--sts_files", "x.csv"], "sts_files: x.csv is not a file"),
    "evaluate: pooling": (
        "evaluate",
        [*MODEL, *OUT, "--sts_files", "x", "--pooling", "max"],
        "pooling: 'max' is unknown",
    ),
    "evaluate: folder": ("evaluate", [*MODEL, *OUT, "--beir_dirs", "x"], "x/corpus.jsonl is missing"),
    "evaluate: sizes": (
        "evaluate",
        [*MODEL, *OUT, "--sts_files", "x", "--sizes", "6by9"],
        "sizes: '6by9' is not a size",
    ),
    "evaluate_franca: method": ("evaluate_franca", [*MODEL, *OUT, "--rasa_method", "x"], "rasa_method: 'x' is unknown"),
    "evaluate_franca: folder": ("evaluate_franca", [*MODEL, *OUT, "--train_dir", "x"], "train_dir: x is not a folder"),
    "evaluate_m3: file": ("evaluate_m3", [*MODEL, *OUT, "--data_file", "x"], "data_file: x is not a file"),
    "export: dtype": ("export", [*MODEL, *OUT, "--dtype", "int8"], "dtype: 'int8' is not allowed for transformers"),
    "export: name": (
        "export",
        ["--model_name_or_path", "a model", *OUT],
        "model_name_or_path: a model is not a folder, nor a name that the Hub allows",
    ),
    "export: layers": (
        "export",
        [*MODEL, *OUT, "--num_layers", "0"],
        "num_layers: 0 is not allowed; use a whole number",
    ),
    "export: model": ("export", [*MODEL, *OUT], "model_name_or_path: ./absent does not exist"),
    "mine_negatives: size": (
        "mine_negatives",
        [*MODEL, "--output_file", "x.csv", "--train_file", "x.csv", "--size", "8"],
        "size: '8' is not a size",
    ),
    "mine_negatives: margin": (
        "mine_negatives",
        [*MODEL, "--output_file", "x.csv", "--train_file", "x.csv", "--margin", "3"],
        "margin: 3.0 is not allowed",
    ),
    "plan: limit": ("plan", [*MODEL, "--max_ms_per_text", "0"], "max_ms_per_text: 0.0 is not allowed"),
    "plan: scores": ("plan", [*MODEL, "--results", "x.json"], "results: x.json is not a file"),
    "push_to_hub: name": (
        "push_to_hub",
        ["--model_name_or_path", ".", "--repo_id", "x"],
        "is not a saved elastic model",
    ),
    "search: index": ("search", ["index", "query"], "index"),
    "build_index: engine": ("build_index", ["--embeddings", "x", "--engine", "mysql"], "engine: 'mysql' is unknown"),
    "build_index: folder": ("build_index", ["--embeddings", "x", *OUT], "embeddings: x has no embeddings.json"),
    "digits_franca: steps": ("digits_franca", ["--steps", "0"], "steps: 0 with 3 seeds is nothing to train"),
}


# Runs a script several times as `python run_scripts/NAME.py FLAGS` does, and prints what happened.
RUNNER = """
import contextlib, io, json, os, runpy, sys
script, cases = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = os.path.dirname(script)
outcomes = []
for flags in cases:
    sys.argv, out, err, code = [script, *flags], io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    outcomes.append([code, out.getvalue(), err.getvalue(), sorted(sys.modules), os.listdir()])
print(json.dumps(outcomes))
"""


class Outcome(NamedTuple):
    """Of a run: the exit code, what was printed, and the modules and files that were there at its end."""

    code: int
    out: str
    err: str
    modules: list[str]
    files: list[str]


def cases(name: str) -> list[list[str]]:
    """The flags of each run of a script: help, an unknown flag, and its entries of WRONG."""
    commands = {"benchmark": ["train"], "classify": ["train"], "search": ["index"], "try_idea": ["--idea", "magic=1"]}
    return [
        ["--help"],
        [*commands.get(name, []), "--nonsense", "1"],
        *(flags for script, flags, _ in WRONG.values() if script == name),
    ]


@functools.cache
def run(name: str) -> list[Outcome]:
    """The outcomes of all cases of a script, in one process of its own, in an empty working directory."""
    command = [sys.executable, "-c", RUNNER, str(ROOT / "run_scripts" / f"{name}.py"), json.dumps(cases(name))]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "COLUMNS": "120"}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < LIMIT
    return [Outcome(*outcome) for outcome in json.loads(done.stdout)]


def check_refusal(outcome: Outcome, name: str, message: str) -> None:
    assert outcome.code == 2
    assert outcome.err.startswith(f"{name}.py: error: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert outcome.out == ""
    assert not outcome.files, "nothing is written"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_an_unknown_flag(name):
    answered, refused = run(name)[:2]
    assert not NOT_YET.intersection(refused.modules)
    assert (answered.code, answered.err) == (0, "")
    assert answered.out.startswith(f"usage: {name}.py ")
    flags = re.split(r"^  (?=-)", answered.out, flags=re.MULTILINE)[1:]
    assert len(flags) > 1
    for flag in flags:
        assert len(help_lines(f"  {flag}")) <= 2, flag
    required = "the following arguments are required: --"
    message = "magic" if name == "try_idea" else required if required in refused.err else "--nonsense"
    check_refusal(refused, name, message)


def help_lines(flag: str) -> list[str]:
    """The lines of a flag's help text, which starts at column 24."""
    lines = flag.partition("\n\n")[0].splitlines()
    return [line[24:] for line in lines if line[22:24] == "  " and line[24:].strip()]


@pytest.mark.parametrize("name", TRAINING)
def test_training_scripts_load_no_more_than_their_flags_need(name):
    answered, refused = run(name)
    assert not NEVER_YET.intersection(refused.modules)
    assert (answered.code, answered.err) == (0, "")
    check_refusal(refused, name, "flags: --nonsense is unknown")


@pytest.mark.parametrize(
    ("start", "flag", "message"),
    [
        (
            ["run_scripts/finetune.py"],
            ["--leerning_rate", "1"],
            "flags: --leerning_rate is unknown; did you mean --learn",
        ),
        (["-m", "twodmse", "elasticize"], ["--effort", "medium"], "effort: 'medium' is unknown; choose one of fit"),
        (["-m", "twodmse", "pretrain"], ["--sizes", "2x"], "sizes: '2x' is not a size; write LAYERSxDIM"),
    ],
)
def test_training_scripts_refuse_a_typo_before_torch_is_imported(start, flag, message):
    command = [sys.executable, "-X", "importtime", *start, *flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert not re.search(r"\| +(torch|accelerate)$", done.stderr, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "sizes": (["--sizes", "1x8", "9x9"], "sizes: 9x9 asks for 9 layers, but the backbone has 1 to 4"),
        "dims": (["--sizes=4x33"], "sizes: 4x33 asks for 33 dimensions, but the backbone has 1 to 32"),
        "role": (["--columns", "a=b"], "columns: 'a=b' is not NAME:ROLE, for example query:anchor"),
        "column": (["--columns", "c:anchor"], "columns: train_file has no column c, only a, document"),
        "separator": (
            ["--eval_file", "semicolons.csv"],
            "eval_file: semicolons.csv has only one column; its columns se",
        ),
        "encoding": (
            ["--train-file", "utf16.tsv"],
            "train_file: utf16.tsv cannot be read as tsv: it is not UTF-8, perh",
        ),
        "folder": (["--model_name_or_path", "./absent"], "model_name_or_path: ./absent does not exist"),
        "guide": (["--guide_model_name_or_path", "a/b"], "guide_model_name_or_path: a/b is not a folder, and the Hub"),
        "recipe": (["recipe.yaml"], "sizes: '6' is not a size"),
        "no recipe": (["finetune.yaml"], "recipe: finetune.yaml is not a file"),
        "near a recipe": (
            ["minilm-nly.yaml"],
            f"recipe: minilm-nly.yaml is not a file; did you mean {cli.RECIPES}/minilm-nli",
        ),
        "no value": (["--sizes"], "sizes: a value is missing after --sizes"),
        "no number": (["--max_steps", "1.5"], "max_steps: '1.5' is not a whole number"),
        "no truth": (["--bf16", "maybe"], "bf16: 'maybe' is not true or false"),
        "objective": (["--objective", "foo"], "objective: 'foo' is unknown; choose one of 2dmse, starbucks"),
        "loss": (["--loss=foo"], "loss: 'foo' is unknown; choose one of infonce, distill_kl"),
        "pooling": (["--pooling", "max"], "pooling: 'max' is unknown; choose one of mean, cls, lasttoken"),
        "no float": (["--learning-rate=1e-5x"], "learning_rate: '1e-5x' is not a number"),
        "names": (
            ["--train_file", "free.jsonl"],
            "columns: train_file has no column a, only Frage, Antwort",
        ),
        "no columns": (
            ["--train_file", "free.jsonl", "--columns", "Frage:anchor"],
            "train_file: the columns (Frage, Antwort) are not one of the accepted sets",
        ),
        "rows": (
            ["--train_file", "rows.tsv", "--columns", "a b c d e:anchor"],
            "train_file: the first line (a b c d e ...) seems to be a row; write the names of the columns above it",
        ),
        "zip": (["--train_file", "book.csv"], "train_file: book.csv is a zip archive or an Excel workbook: unpack it"),
        "gzip": (["--train_file", "pairs.csv.gz"], "train_file: pairs.csv.gz is not compressed by gzip; remove .gz"),
        "a folder": (["--train_file", "model"], "train_file: model is a folder, but not one of datasets.save_to_disk"),
        "output": (["--output_dir", "pairs.csv/out"], "output_dir: pairs.csv/out cannot be made, because /"),
    }.values(),
)
def test_wrong_values_of_a_training_script(flags, message, tmp_path, monkeypatch, capsys):
    """In this process, with the flags of a run that works before those that are wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "distilbert", "n_layers": 4, "dim": 32}')
    (tmp_path / "pairs.csv").write_text("a,document\nx,y\n")
    (tmp_path / "semicolons.csv").write_text("anchor;positive\nx;y\n")
    (tmp_path / "utf16.tsv").write_text("anchor\tpositive\nx\ty\n", encoding="utf-16")
    (tmp_path / "free.jsonl").write_text('{"Frage": "x", "Antwort": "y"}\n')
    (tmp_path / "rows.tsv").write_text("a b c d e\tf\ng\th\n")
    (tmp_path / "book.csv").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "pairs.csv.gz").write_text("a,document\nx,y\n")
    (tmp_path / "recipe.yaml").write_text("sizes: [6]\n")
    good = ["--model_name_or_path", "model", "--train_file", "pairs.csv", "--sizes", "4x32", "--columns", "a:anchor"]
    early.refuse(str(ROOT / "run_scripts" / "finetune.py"), good)
    words = flags + good[:4] + good[6:] if flags[0].endswith(".yaml") else good + flags
    with pytest.raises(SystemExit, match="2"):
        early.refuse(str(ROOT / "run_scripts" / "finetune.py"), words)
    assert f": error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ('{"num_hidden_layers": 6, "hidden_size": 384, "dim": 8}', (6, 384)),
        ('{"n_layer": 2, "n_embd": 4}', (2, 4)),
        ('{"text_config": {"hidden_size": 8}, "num_layers": "3"}', (None, None)),
        ("[1]", (None, None)),
        ("{", (None, None)),
    ],
)
def test_the_shape_of_a_model(config, shape, tmp_path):
    (tmp_path / "config.json").write_text(config)
    assert read_shape(str(tmp_path)) == shape
    assert read_shape(str(tmp_path / "absent")) == (None, None)


def test_sizes_are_beyond_a_model_as_the_library_says(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6, "hidden_size": 384}')
    for size in ("6x384", "7x8", "1x385"):
        wanted = reason(parse_ladder, [size], 6, 384)
        assert reason(checks.check_sizes, [size], "sizes", str(tmp_path)) == wanted
        assert (wanted is None) == (size == "6x384")


@pytest.mark.parametrize("name", TRAINING)
def test_flags_are_known_without_torch(name):
    """Those of a script's own parser, which `--help_all` shows."""
    script = importlib.import_module(f"run_scripts.{name}")
    kinds = [kind for kind in vars(script).values() if dataclasses.is_dataclass(kind)]
    if name == "classify":  # its commands have flags of the same names
        kinds = [script.ModelArguments, script.DataArguments, script.ClassifierTrainingArguments]
    assert set(cli.Parser(kinds)._option_string_actions) <= set(early.find_options(early.find_kinds(name)))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    name, flags, message = WRONG[case]
    outcome = run(name)[cases(name).index(flags)]
    assert not NOT_YET.intersection(outcome.modules)
    check_refusal(outcome, name, message)


def test_the_other_two_ways_to_start_a_script(tmp_path):
    """From another working directory: `python -m run_scripts.x` and `twodmse x`."""
    for module, words, usage in (("run_scripts.search", [], "search.py"), ("twodmse", ["search"], "twodmse search")):
        command = [sys.executable, "-m", module, *words, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: {usage} INDEX")
    assert set(COMMANDS) <= {*SCRIPTS, *TRAINING}


def test_choices_are_those_of_the_libraries():
    assert checks.PRECISIONS == PRECISIONS == tuple(BYTES)
    assert checks.EXPORT_DTYPES == export.DTYPES
    assert tuple(checks.EXPORT_DTYPES) == export.FORMATS
    assert checks.RASA_METHODS == rasa.METHODS
    assert checks.POOLINGS == POOLING_MODES
    assert {f"elasticize-{effort}.yaml" for effort in checks.EFFORTS} <= {path.name for path in cli.RECIPES.iterdir()}
    assert tuple(FORMATS) == headings.SUFFIXES
    assert list(registry.MEASURES) == list(benchmark.BENCHMARKS)


@pytest.mark.parametrize(
    "size", ["6x128", " 1x8 ", "0x8", "6x0", "x8", "6x", "6X8", "06x8", "6x8x2", "-1x8", "", "six"]
)
def test_sizes_are_refused_as_the_library_refuses_them(size):
    assert reason(checks.check_sizes, [size]) == reason(parse_size, size)


def test_files_are_refused_as_the_library_refuses_them():
    assert reason(checks.check_files, "train_file", "none.csv") == reason(read_table, "none.csv") is not None


def reason(function, *args) -> str | None:
    """The message with which a function refuses its arguments."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return None
