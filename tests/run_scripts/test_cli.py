"""The command line of the training scripts: help in groups, renamed flags, quick starts, and the life of a run."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trainer.arguments
import trainer.objectives
from run_scripts import classify, finetune, pretrain, pretrain_franca, train_m3
from run_scripts.shared import cli, help_text, output_dir, runs
from trainer.shared.arguments import BaseTrainingArguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "finetune": finetune.main,
    "pretrain": pretrain.main,
    "train_m3": train_m3.main,
    "pretrain_franca": pretrain_franca.main,
    "classify": lambda argv: classify.main(["train", *argv]),
}
# A process that has only looked at the flags has loaded none of these.
HEAVY = ("datasets", "evaluate", "matplotlib", "peft", "sentence_transformers", "sklearn", "trainer.trainer")
HEAVY += ("modeling_2dmse", "modeling_mrl", "modeling_m3", "modeling_franca", "transformers.trainer")


def show_help(main, flag: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main([flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def texts_of(shown: str) -> dict[str, list[str]]:
    """The lines of text under each flag; a short flag has the first line beside it."""
    texts: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if line.startswith("  -"):
            texts[line.split()[0]] = [line[24:]] if line[22:24].isspace() and line[24:].strip() else []
        elif line.startswith(" " * 24):
            texts[list(texts)[-1]].append(line)
    return texts


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_groups_and_texts_of_two_lines(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = show_help(SCRIPTS[name], "--help", capsys)
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert titles == [f"{title}:" for title in (*help_text.GROUPS, "help")]
    texts = texts_of(shown)
    assert {"--model_name_or_path", "--learning_rate", "--output_dir", "--help_all"} <= texts.keys()
    assert {flag: lines for flag, lines in texts.items() if not 1 <= len(lines) <= 2} == {}
    assert "None" not in shown
    assert "--no_" not in shown
    assert "--output-dir" not in shown
    assert "--adam_beta1" not in texts
    assert shown.splitlines()[-1] == "--help_all also shows the other flags of transformers.TrainingArguments."


def test_help_all_shows_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    mine, every = (texts_of(show_help(finetune.main, flag, capsys)) for flag in ("--help", "--help_all"))
    names = {f"--{name}" for kind in finetune.ARGUMENTS for name in kind.__dataclass_fields__}
    assert names == every.keys() - {"-h,", "--help_all"}
    assert mine.keys() < every.keys()


def test_each_flag_that_a_group_names_exists():
    fields = {
        name
        for kinds in (finetune.ARGUMENTS, (classify.ModelArguments, classify.DataArguments))
        for kind in kinds
        for name in kind.__dataclass_fields__
    }
    assert {name for names in help_text.GROUPS.values() for name in names} <= fields
    assert set(help_text.TEXTS) <= {name for names in help_text.GROUPS.values() for name in names}


def test_help_of_a_script_without_training_has_one_list(capsys):
    @dataclass
    class Few:
        output_dir: str = field(metadata={"help": "Where."})
        sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Which."})
        fast: bool = field(default=True, metadata={"help": "Whether, in 100 % of cases.".replace("%", "%%")})

    shown = cli.Parser((Few,)).format_help().split("flags:\n")[1]
    assert [" ".join(line.split()) for line in shown.splitlines()] == [
        "--output_dir DIR Where. (required)",
        "--sizes N [N ...] Which. (default: 1 2)",
        "--fast [true|false] Whether, in 100 % of cases. (default: true)",
        "-h, --help show this help message and exit",
    ]


@pytest.mark.parametrize(("old", "new"), cli.RENAMED.items())
def test_renamed_flags_are_refused_with_the_new_name(old, new, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: m\n{old}: 5\n")
    for argv in ([f"--{old}", "5"], [f"--{old}=5"], [f"--{old.replace('_', '-')}", "5"], [str(recipe)]):
        with pytest.raises(SystemExit, match="2"):
            finetune.main(argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"error: flags: --{old} is now --{new}")


def test_exactly_one():
    for first, second in ((None, None), ("a", "b")):
        with pytest.raises(ValueError, match=r"^train_file: name the texts with either --train_file or --data"):
            cli.exactly_one(
                SimpleNamespace(train_file=first, dataset_name=second), "train_file", "dataset_name", "the texts"
            )
    cli.exactly_one(SimpleNamespace(train_file="a", dataset_name=None), "train_file", "dataset_name", "the texts")


def test_quick_checks_come_before_training_arguments_are_made():
    @dataclass
    class Slow:
        seen = []
        name: str = "x"

        def __post_init__(self):
            self.seen.append("made")

    def check(data, values):
        Slow.seen.append((data.overwrite, values.name))

    parser = cli.Parser((runs.OverwriteArguments, Slow))
    assert parser.parse(["--overwrite", "--name", "y"], check)[1].name == "y"
    assert Slow.seen == [(True, "y"), "made"]


def test_the_names_that_arguments_state_are_those_of_the_objectives():
    assert tuple(trainer.objectives.OBJECTIVES) == trainer.choices.OBJECTIVES


@pytest.fixture
def life(tmp_path):
    """An output folder with an earlier run, a function that begins a run over it, and the events of its trainer."""
    out, events = tmp_path / "out", []
    out.mkdir()
    (out / "config.json").write_text("earlier")
    output_dir.mark(str(out), "a script")

    def train(resume_from_checkpoint):
        events.append(f"train {resume_from_checkpoint}")

    def wait_for_everyone():
        events.append("others check " + (out / "config.json").read_text())

    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        train=train,
        accelerator=SimpleNamespace(wait_for_everyone=wait_for_everyone, end_training=lambda: events.append("end")),
    )

    def start():
        flags = ["--output_dir", str(out), "--overwrite", "--use_cpu", "--bf16", "false"]
        return runs.training_run(cli.Parser((runs.OverwriteArguments, BaseTrainingArguments)), flags)

    return SimpleNamespace(out=out, events=events, trainer=trainer, start=start, folder=tmp_path)


def test_the_life_of_a_run(life):
    with life.start() as run:
        assert (life.out / "config.json").read_text() == "earlier"
        run.begin(life.trainer)
        assert [path.name for path in life.out.iterdir()] == [output_dir.MARKER]
        (previous,) = life.folder.glob("out.previous-*")
        run.train()
        assert (previous / "config.json").read_text() == "earlier"
        assert life.events == ["others check earlier", "train None"]
    assert list(life.folder.iterdir()) == [life.out]
    assert life.events == ["others check earlier", "train None", "end"]


def test_a_wrong_input_before_begin_ends_in_one_line_and_moves_nothing(life, capsys):
    with pytest.raises(SystemExit, match="2"), life.start():
        raise ValueError("sizes: wrong")
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: sizes: wrong")
    assert [path.name for path in life.folder.iterdir()] == ["out"]
    assert (life.out / "config.json").read_text() == "earlier"
    assert life.events == []


def test_an_error_of_the_program_keeps_its_traceback_and_the_earlier_run(life):
    def broken_run():
        with life.start() as run:
            run.begin(life.trainer)
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        broken_run()
    (previous,) = life.folder.glob("out.previous-*")
    assert (previous / "config.json").read_text() == "earlier"
    assert life.events == ["others check earlier"]


def run_script(*command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)


# Runs a script several times as `python run_scripts/NAME.py FLAGS` does, each time with new modules of the project, and
# prints what happened. The libraries are imported once, which takes most of the time.
RUNNER = """
import contextlib, io, json, os, runpy, sys
script, cases = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = os.path.dirname(script)
for flags in cases:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("run_scripts", "trainer", "retrieval")]:
        del sys.modules[name]
    sys.argv, err, code = [script, *flags], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    print(json.dumps([code, err.getvalue(), list(sys.modules)]))
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_refusals_load_no_libraries_of_training(name, tmp_path):
    command = ["train"] if name == "classify" else []
    kind, flag = ("folder", "train_dir") if name == "pretrain_franca" else ("file", "train_file")
    wrong = [*command, "--model_name_or_path", "m", "--output_dir", "out", f"--{flag}", "absent"]
    for folder, file, content in (("m", "config.json", "{}"), ("out", "data.csv", "query,document")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(content)
    there = "out" if kind == "folder" else "out/data.csv"
    # An unknown flag, and a table of finetune.py that is not there, are refused before the flags are parsed. What is
    # not parsed comes first: the libraries that parsing needs stay loaded.
    cases = [
        ([*wrong, "--nonsense"], 2, "flags: --nonsense is unknown", False),
        (wrong, 2, f"{flag}: absent is not a {kind}", name != "finetune"),
        ([*command, "--help"], 0, "", True),
        ([*wrong[:-1], there], 2, "output_dir: out is not empty", True),
    ]
    start = time.perf_counter()
    script = str(ROOT / "run_scripts" / f"{name}.py")
    given = json.dumps([argv for argv, *_ in cases])
    done = run_script("-c", RUNNER, script, given, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    seconds = time.perf_counter() - start
    for (_, code, message, parsed), line in zip(cases, done.stdout.splitlines(), strict=True):
        ended, errors, loaded = json.loads(line)
        assert ended == code
        needed = ("trainer.shared.arguments", "transformers.training_args", "torch")
        assert [module in loaded for module in needed] == [parsed] * 3
        assert set(loaded).intersection(HEAVY) == set()
        assert ([] if code == 0 else [f"{name}.py: error: {message}"]) == [
            error[: len(f"{name}.py: error: {message}")] for error in errors.splitlines() if error.strip()
        ]
    assert {path.name for path in tmp_path.rglob("*")} == {"m", "config.json", "out", "data.csv"}
    assert seconds < 20


@pytest.mark.parametrize("way", [["-m", "run_scripts.finetune"], ["-m", "twodmse", "finetune"]])
def test_other_ways_to_start_a_script(way, tmp_path):
    done = run_script(*way, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "--max_eval_samples" in done.stdout


def test_peft_is_loaded_when_the_class_of_a_model_is_asked_for(tmp_path):
    code = (
        "import sys\n"
        "from run_scripts.shared import runs\n"
        "from trainer.arguments import TwoDMSETrainingArguments\n"
        "from transformers import trainer_utils, utils\n"
        "assert 'peft' not in sys.modules and utils.is_peft_available()\n"
        "import torch\n"
        "assert not trainer_utils._is_peft_model(torch.nn.Linear(1, 1))\n"
        "from peft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(1, 1)), LoraConfig(target_modules=['0']))\n"
        "assert trainer_utils._is_peft_model(model)\n"
        "assert trainer_utils.is_peft_available is utils.is_peft_available\n"
    )
    done = run_script("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
