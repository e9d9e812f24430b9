"""Measuring time and memory of several sides in turn, and the ratios between them."""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from run_scripts.shared.peak import process_peak


def seconds(function: Callable[[], object]) -> float:
    """The seconds that a call takes, including the work on the GPU."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def in_turn(runs: int, sides: dict[str, Callable[[], float]], until: float = math.inf) -> dict[str, list[float]]:
    """The figures of each side, measured in turn and `runs` times, so that a slow minute affects all of them.

    No round but the first begins after `until`, a time of `time.perf_counter()`.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(runs):
        if number and time.perf_counter() > until:
            break
        for name, side in sides.items():
            figures[name].append(side())
        print("  ".join(f"{name} {values[-1]:.4g}" for name, values in figures.items()), flush=True)
    return figures


def row(id: str, target: str, above: list[float], below: list[float], **more) -> dict:
    """A row of benchmark.json: median, lowest and highest ratio of the figures of two sides, run by run."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    spread = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"id": id, **spread, "target": target, "runs": len(ratios), **more}


def wait() -> None:
    """Wait until the GPU, if any, has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> float:
    """The peak memory of this process in GB: of the tensors on the GPU or, without one, of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return process_peak()


def allocated_at_peak(function) -> int:
    """The peak bytes of tensors during a call, from torch's record of each allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def in_a_fresh_process(function, *args) -> float:
    """The value that a function sends through a pipe, run in its own process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*args, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def write_profile(function: Callable[[], object], path: Path) -> None:
    """Write a table of the operations that take the time of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=order, row_limit=40))
    print(f"profile: {path}", flush=True)
