"""Measuring: sides in turn, ratios of what they took, and memory."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from run_scripts.shared.peak import process_peak


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, the GPU's work included."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def in_turn(runs: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each side reports, one side after the other, `runs` times over, so that a slow minute meets them all."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            figures[name].append(side())
        print("  ".join(f"{name} {values[-1]:.4g}" for name, values in figures.items()), flush=True)
    return figures


def row(id: str, target: str, above: list[float], below: list[float], **more) -> dict:
    """A line of benchmark.json: the median, lowest and highest of the ratios of two sides' figures, run by run."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    spread = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"id": id, **spread, "target": target, "runs": len(ratios), **more}


def wait() -> None:
    """Until the GPU, where there is one, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> float:
    """Most memory that this process has held, in GB: the GPU's tensors, or all of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return process_peak()


def allocated_at_peak(function) -> int:
    """Most bytes of tensors that a function holds at once, by torch's own account of each allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def in_a_fresh_process(function, *args) -> float:
    """What a function sends through a pipe, from a process of its own."""
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
    """A table of the operations that a call spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.key_averages().table(sort_by=order, row_limit=40))
    print(f"profile: {path}", flush=True)
