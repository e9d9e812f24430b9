"""What the benchmark compares is the same computation, and its account of memory is right."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from run_scripts import benchmark, benchmark_smae, common
from run_scripts.benchmark_memory import DOCUMENTS, QUERIES, loss_memory
from run_scripts.measure import allocated_at_peak, in_a_fresh_process, peak_memory


def test_allocations_are_counted_at_their_peak():
    def work():
        first = torch.ones(1000)  # 4,000 bytes
        second = first + 1
        del first, second
        torch.ones(1500)

    assert 8000 <= allocated_at_peak(work) < 9000


def test_the_loss_holds_little():
    """Six sizes of a 768-dimensional model, 128 queries against 1,024 documents."""
    assert loss_memory() <= 6 * QUERIES * DOCUMENTS * 6 * 4


def _hold(megabytes, pipe):
    block = torch.ones(megabytes * 250_000)
    pipe.send(peak_memory() + 0 * block[0].item())


def test_the_peak_of_a_fresh_process_is_its_own():
    block = torch.ones(100_000_000)  # 0.4 GB here must not count there
    little, much = (in_a_fresh_process(_hold, size) for size in (1, 301))
    assert 0.25 < much - little < 0.35
    assert block[0] == 1


def test_both_sides_of_the_smae_benchmark_compute_the_same(monkeypatch):
    monkeypatch.setattr(benchmark_smae, "ROWS", 2)
    monkeypatch.setattr(benchmark_smae, "LENGTH", 12)
    model, batch = benchmark_smae.make_model(["1x32", "6x384"]).eval(), benchmark_smae.make_batch()
    torch.testing.assert_close(model(**batch).loss, benchmark_smae.plain_loss(model, batch), atol=1e-4, rtol=0)


def test_wrong_input_ends_in_one_line(capsys):
    for words, message in (
        (["nothing"], "benchmark: 'nothing' is unknown; choose one of grid, memory, smae"),
        (["grid"], "sts_files: name texts to measure on with --sts_files or --beir_dirs"),
    ):
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(words)
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("path", sorted((common.RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    assert config.distributed_type is not None
