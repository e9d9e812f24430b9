"""How much memory something takes."""

import multiprocessing
import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory() -> float:
    """Most memory that this process has held, in GB: the GPU's tensors, or all of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak does not begin with that of the process that started us
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
