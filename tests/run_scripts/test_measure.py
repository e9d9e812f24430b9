"""The measures of time and memory; apart from test_benchmark.py, since each fresh process imports this file."""

import torch

from run_scripts.shared.measure import allocated_at_peak, in_a_fresh_process, in_turn, peak_memory, row


def test_allocations_are_counted_at_their_peak():
    def work():
        first = torch.ones(1000)  # 4,000 bytes
        second = first + 1
        del first, second
        torch.ones(1500)

    assert 8000 <= allocated_at_peak(work) < 9000


def _hold(megabytes, pipe):
    block = torch.ones(megabytes * 250_000, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.send(peak_memory() + 0 * block[0].item())


def test_the_peak_of_a_fresh_process_is_its_own():
    block = torch.ones(100_000_000)  # 0.4 GB here must not count there
    little, much = (in_a_fresh_process(_hold, size) for size in (1, 301))
    assert 0.25 < much - little < 0.35
    assert block[0] == 1


def test_sides_take_turns_and_ratios_are_taken_run_by_run():
    calls = []
    figures = in_turn(3, {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"})
    assert calls == list("ababab")
    assert figures == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    line = row("x", "<= 1", figures["a"], figures["b"], cells=2)
    assert (line["ratio"], line["min"], line["max"], line["runs"], line["cells"]) == (0.75, 0.5, 5 / 6, 3, 2)
