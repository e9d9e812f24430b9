"""The code blocks of README and manual: finding them, and running what a reader would type.

A block of Python or bash is run unless the line above its fence is one of these comments:

    <!-- not run: REASON -->        for what needs the network, a GPU or minutes, and is no command of this project
    <!-- parsed only: REASON -->    the same for this project's commands: their flags are parsed, Python is compiled
"""

import importlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from run_scripts.shared import cli

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("bash", "python", "json", "text")
MARKERS = ("not run", "parsed only")
_FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- *(?P<kind>[\w ]+?): *(?P<reason>.*?) *-->$")

# Bash itself expands a block, with every program replaced by a function that notes down how it was called.
_PROGRAMS = ("accelerate", "python", "torchrun", "twodmse")
_PREAMBLE = r"""
set -eu
note() {
    printf '%s\x1f' "$@" >> "$CALLS"
    if [ "${!#}" = "-" ]; then printf '%s\x1f' "$(cat_stdin)" >> "$CALLS"; fi
    printf '\x1e' >> "$CALLS"
}
cat_stdin() { local line; while IFS= read -r line; do printf '%s\n' "$line"; done; }
mkdir() { :; }
"""

# What is appended to a script's flags, so that seconds suffice; a later flag wins over an earlier one.
_QUICK = (
    "--use_cpu true --bf16 false --disable_tqdm true --report_to none --max_steps 2 --per_device_train_batch_size 8"
)
SHORTER = {
    "elasticize": f"{_QUICK} --num_pairs 32",
    "finetune": _QUICK,
    "pretrain": _QUICK,
    "classify train": f"{_QUICK} --eval_strategy no --save_strategy no",
    "train_m3": f"{_QUICK} --save_strategy no",
    "pretrain_franca": f"{_QUICK} --save_strategy no",
    "mine_negatives": "--margin 0",  # random weights give all texts similar embeddings
    "plan": "--sizes ladder --texts texts.txt",
}
# In place of the recipes' all-MiniLM-L6-v2, which is large.
SMALL_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ON_ALL_MINILM = ("finetune", "pretrain")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `line` is that of its first line of code, and `kind` and `reason` are its marker's."""

    page: Path
    line: int
    language: str
    text: str
    kind: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks(page: Path, text: str) -> list[Block]:
    """The code blocks of a page, in order."""
    blocks = []
    for fence in _FENCE.finditer(text):
        above = text[: fence.start()].rstrip("\n").rsplit("\n", 1)[-1]
        marker = _MARKER.match(above)
        line = text.count("\n", 0, fence.start()) + 2
        found = (marker["kind"], marker["reason"]) if marker else ("", "")
        blocks.append(Block(page, line, fence["language"], fence["text"], *found))
    return blocks


def problems(block: Block) -> list[str]:
    """What is wrong with a block before anything runs."""
    found = []
    if block.language not in LANGUAGES:
        found.append(f"{block}: its language is {block.language!r}; use one of {', '.join(LANGUAGES)}")
    if block.kind and block.kind not in MARKERS:
        found.append(f"{block}: its marker is {block.kind!r}; use one of {', '.join(MARKERS)}")
    if block.kind and not block.reason:
        found.append(f"{block}: its marker {block.kind!r} gives no reason")
    return found


def calls(block: Block, folder: Path) -> list[list[str]]:
    """The programs that a bash block starts, as words; what is read from standard input is the last word."""
    log = folder / "calls"
    log.write_text("")
    programs = "\n".join(f'{name}() {{ note {name} "$@"; }}' for name in _PROGRAMS)
    environment = {"PATH": str(folder), "CALLS": str(log), "DATA": "data", "S": "0", "LC_ALL": "C.UTF-8"}
    script = f"{_PREAMBLE}{programs}\n{block.text}"
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block}: bash block: {done.stderr.strip()}"
    found = [call.split("\x1f")[:-1] for call in log.read_text().split("\x1e")[:-1]]
    log.unlink()
    assert found, f"{block}: bash block: it starts no command of this project, and no marker says why"
    return found


def script_of(block: Block, call: list[str]) -> tuple[str, list[str]]:
    """The name of the script that a call starts, and its flags."""
    if call[0] == "twodmse":
        return call[1], call[2:]
    if call[1] == "-m" and call[2].startswith("run_scripts."):
        return call[2].removeprefix("run_scripts."), call[3:]
    places = [place for place, word in enumerate(call) if word.endswith(".py")]
    assert places, f"{block}: {' '.join(call)} starts no script"
    path = Path(call[places[0]])
    assert (ROOT / path).is_file(), f"{block}: {path} does not exist"
    for config in [word for word in call[: places[0]] if word.endswith(".yaml")]:
        assert (ROOT / config).is_file(), f"{block}: {config} does not exist"
    return path.stem, call[places[0] + 1 :]


def run_call(block: Block, call: list[str]) -> None:
    """Call the script's `main` with the reader's flags, and some that make it quick."""
    if call[1] == "-":
        exec(compile(call[2], str(block), "exec"), {})
        return
    name, flags = script_of(block, call)
    command = " ".join([name, *flags[:1]])
    flags += SHORTER.get(name, SHORTER.get(command, "")).split()
    if name in ON_ALL_MINILM and "--model_name_or_path" not in flags:
        flags += ["--model_name_or_path", SMALL_MODEL]
    if name in ON_ALL_MINILM and "--resume_from_checkpoint" not in flags:
        flags += ["--overwrite", "true"]  # models that other pages' commands have left are there
    main_of(name)(flags)


class Parsed(BaseException):
    """Raised when a script has parsed its flags, so that it does nothing else."""


def parse_call(block: Block, call: list[str], monkeypatch) -> None:
    """Let the script parse the reader's flags by its own parser, and no more."""
    if call[1] == "-":
        compile(call[2], str(block), "exec")
        return
    name, flags = script_of(block, call)
    if name == "benchmark":
        assert flags[0] in importlib.import_module("run_scripts.benchmark").BENCHMARKS, f"{block}: {flags[0]}"
    parse = cli.Parser.parse

    def only_parse(parser, argv=None, *rest, **options):
        parse(parser, argv)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse", only_parse)
        try:
            main_of(name)(flags)
        except Parsed:
            return
    raise AssertionError(f"{block}: {name} has parsed nothing")


def main_of(name: str):
    """The `main` of a script, as a function of its flags; `--help` ends with exit code 0."""
    script = importlib.import_module(f"run_scripts.{name}").main

    def main(flags: list[str]) -> None:
        try:
            script(flags)
        except SystemExit as error:
            if error.code:
                raise AssertionError(f"{name} {' '.join(flags)} ended with exit code {error.code}") from error

    return main


def run_block(block: Block, namespace: dict, folder: Path, monkeypatch) -> None:
    """Run, parse or compile a block, as its marker says."""
    if block.language == "python":
        code = compile(block.text, str(block), "exec")
        if not block.kind:
            exec(code, namespace)
    elif block.language == "bash" and block.kind != "not run":
        for call in calls(block, folder):
            if call == ["twodmse", "--help"]:
                continue
            if block.kind:
                parse_call(block, call, monkeypatch)
            else:
                run_call(block, call)


def links(text: str) -> list[str]:
    """Targets of the links and pictures of a page, outside of its code."""
    text = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def paths(text: str) -> set[str]:
    """Files of the project that a page names in code: `run_scripts/x.py`, `recipes/x.yaml`, `docs/x.md`."""
    pattern = r"`((?:docs|modeling_\w+|model_cards|recipes|retrieval|run_scripts|tests|trainer)/[\w./-]+\.\w+)`"
    return {f"run_scripts/{path}" if path.startswith("recipes/") else path for path in re.findall(pattern, text)}


def relative(path: Path) -> str:
    """The path from the project's root."""
    return os.path.relpath(path, ROOT)
