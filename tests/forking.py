"""New processes that have imported the libraries already: they are forked from one process that does nothing else.

Python needs some five seconds of a core to import torch, transformers and datasets. Tests that start and kill many
processes would spend most of their time on that.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

# What takes long to import. None of them may start a thread when imported, except those of OpenBLAS, which end before a
# fork; the project itself is imported afterwards.
_LIBRARIES = (
    "torch",
    "torch.distributed",
    "transformers.trainer",
    "accelerate",
    "datasets",
    "peft",
    "safetensors.torch",
    "scipy.stats",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_LIBRARIES))


class ForkedScript:
    """`python script arguments` in a process of its own, with these variables as its whole environment.

    Args:
        script: its path.
        arguments: what follows it in `sys.argv`.
        environment: the variables. The libraries have read their own when the first such process was started.
        output: file that gets its standard output and standard error.

    Attributes:
        pid: of the process.
    """

    def __init__(self, script: Path, arguments: Sequence[str], environment: dict[str, str], output: Path):
        output.touch()
        given = (str(script), list(arguments), environment, str(output), os.getcwd())
        self._process = _context.Process(target=_run, args=given, daemon=False)
        self._output = output
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit status. TimeoutError if it still runs."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the process still runs after {timeout} s")
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def output(self) -> str:
        """What it has printed until now."""
        return self._output.read_text(errors="replace")


def _run(script: str, arguments: list[str], environment: dict[str, str], output: str, folder: str) -> None:
    gc.freeze()  # as pytest_runtest_setup in conftest.py
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.close(written)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))  # the libraries have read the variable before
    sys.argv = [script, *arguments]
    first = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.path.dirname(script), *first, *sys.path]
    runpy.run_path(script, run_name="__main__")


def start_group(script: Path, arguments: Sequence[str], environment: dict[str, str], world: int) -> list[ForkedScript]:
    """Start a script in several processes that find each other as those of `torchrun` do; outputs go beside it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [
        ForkedScript(
            script,
            arguments,
            environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            script.with_suffix(f".{rank}.log"),
        )
        for rank in range(world)
    ]


def finish(group: Sequence[ForkedScript]) -> list[str]:
    """Wait for all processes, and kill them if one fails; what each has printed. AssertionError with its output."""
    try:
        while None in [process.poll() for process in group] and not any(process.poll() for process in group):
            time.sleep(0.02)
        for process in group:
            assert not process.poll(), process.output()[-3000:]
    finally:
        kill(group)
    return [process.output() for process in group]


def kill(group: Sequence[ForkedScript]) -> None:
    """Send SIGKILL to all processes that still run, and wait for their end."""
    for process in group:
        process.kill()
    for process in group:
        process.wait(timeout=60)
