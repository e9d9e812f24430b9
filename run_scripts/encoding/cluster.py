"""encode.py by Ray: one worker per GPU, or per so many cores. Each loads the model once and makes whole shards."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.shards import Shard, Store

if TYPE_CHECKING:
    from run_scripts.encode import EncodeArguments, Encoder, Progress

# A shard is the same whoever makes it, so that what a lost worker had is given to another process of it.
_RESTARTS = 3
_SECONDS = 10
# What goes wrong is raised in Python; errors of Ray's own processes are about its inner life, such as a task that was
# open when it was shut down. The last one is a change of Ray's that it announces.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def check_address(address: str) -> None:
    """ValueError unless there is something at a cluster's address; Ray itself would try for minutes."""
    match = re.fullmatch(r"([^\s/]+):([0-9]{1,5})", address)
    if match is None and address != "auto":
        raise ValueError(f"ray_address: {address!r} is not allowed; write HOST:PORT, or auto")
    if match is not None:
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a host that cannot be one
            raise ValueError(f"ray_address: {address} cannot be reached: {_line(error)}") from error


class Worker:
    """What runs in a process of Ray, on any machine of the cluster.

    Args:
        fields: of EncodeArguments, with absolute paths.
        settings: of the encoder that the shards must be made with.
        threads: for computing on the CPU; None on a GPU.
    """

    def __init__(self, fields: dict, settings: dict, threads: int | None):
        self._fields, self._settings, self._threads = fields, settings, threads

    @functools.cached_property
    def _encoder(self) -> Encoder:
        import torch

        from run_scripts import encode
        from run_scripts.shared import screen

        screen.hide_noise()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        device = "cpu" if self._threads is not None else torch.accelerator.current_accelerator()
        encoder = encode.Encoder(encode.EncodeArguments(**self._fields), device)
        name = "model_name_or_path"  # may be written in another way
        differ = [key for key in self._settings if key != name and encoder.settings.get(key) != self._settings[key]]
        if differ:
            found = f"{self._fields[name]} on {socket.gethostname()}"
            raise ValueError(f"{name}: {found} is not the model of this machine (its {', '.join(differ)} differ)")
        return encoder

    def load(self) -> int:
        """Load the model, before there is any shard: 0. ValueError if it is not the expected one."""
        self._encoder  # noqa: B018
        return 0

    def write(self, shard: Shard) -> int:
        """Embed and write a shard; the number of its texts."""
        store = Store(Path(self._fields["output_dir"]), self._settings["sizes"], self._fields["format"])
        store.write(shard, self._encoder([item.text for item in shard.texts]))
        return len(shard.texts)


class Workers:
    """The workers of a run: as many as the cluster has GPUs or, without any, room for `ray_cpus` cores.

    A worker joins when its resources are free and its model is loaded.

    Args:
        args: of the script.
        settings: of the encoder.
        progress: told of finished shards.

    Raises:
        ValueError: the cluster cannot be reached, a worker cannot be started or has failed.
    """

    def __init__(self, args: EncodeArguments, settings: dict, progress: Progress):
        self._args, self._settings, self._progress = args, settings, progress
        self._idle: list = []
        self._queue: collections.deque[Shard] = collections.deque()
        self._writing = 0

    def __enter__(self) -> Workers:
        self._ray = _library()
        try:
            self._connect()
            self._start()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._ray.shutdown()

    def _connect(self) -> None:
        address = self._args.ray_address
        local = {"include_dashboard": False} if address is None else {}
        try:
            self._ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # Ray raises this class itself for a node that does not start in time
            state = "engine: Ray cannot be started" if address is None else f"ray_address: {address} cannot be used"
            raise ValueError(f"{state}: {_line(error)}") from error

    def _start(self) -> None:
        number, resources, threads = self._plan()
        fields = vars(self._args) | {"output_dir": os.path.abspath(self._args.output_dir)}
        if os.path.isdir(self._args.model_name_or_path):
            fields["model_name_or_path"] = os.path.abspath(self._args.model_name_or_path)
        remote = self._ray.remote(Worker).options(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, **resources)
        workers = [remote.remote(fields, self._settings, threads) for _ in range(number)]
        self._busy = {worker.load.remote(): worker for worker in workers}
        self._number = number

    def _plan(self) -> tuple[int, dict[str, int], int | None]:
        """How many workers, what each needs of the cluster, and its threads."""
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        if gpus:
            return gpus, {"num_gpus": 1}, None
        cpus = self._args.ray_cpus or 1
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        if max(cores) < cpus:
            raise ValueError(f"ray_cpus: {cpus} is not allowed; the largest machine of Ray has {max(cores)} cores")
        return sum(count // cpus for count in cores), {"num_cpus": cpus}, cpus

    def make(self, shard: Shard) -> None:
        """Give a shard to a worker, or keep it for one; waits while there is one kept for each."""
        with self._errors():
            self._queue.append(shard)
            self._step(timeout=0)
            while len(self._queue) > self._number:
                self._step()

    def wait(self) -> None:
        """Wait until all shards are written."""
        with self._errors():
            while self._queue or self._writing:
                self._step()

    def _step(self, timeout: float | None = None) -> None:
        """Wait for a worker that has loaded its model or written its shard, and give out shards."""
        ready, _ = self._ray.wait([*self._busy], num_returns=1, timeout=timeout) if self._busy else ([], [])
        for reference in ready:
            rows = self._ray.get(reference)
            self._idle.append(self._busy.pop(reference))
            if rows:
                self._writing -= 1
                self._progress.bar.update(rows)
                self._progress(rows, True)
        while self._idle and self._queue:
            worker = self._idle.pop()
            self._busy[worker.write.remote(self._queue.popleft())] = worker
            self._writing += 1

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What went wrong in a worker, as a ValueError of one line."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            if not isinstance(error.cause, (ValueError, OSError)):
                raise
            raise ValueError(str(error.cause)) from None
        except errors.RayError as error:
            raise ValueError(f"engine: a Ray worker is lost, finished shards are kept: {_line(error)}") from error


def _library() -> Any:
    """Ray, which is not to send statistics, and not to print what only its developers can use."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
