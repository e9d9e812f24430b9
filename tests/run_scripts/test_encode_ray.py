"""encode.py --engine ray: two workers write the files of one process, also if one of them is killed."""

import contextlib
import importlib.util
import os
import re
import signal

import psutil
import pytest
import torch
from test_encode_script import flags, start  # noqa: F401 (start is a fixture)

from retrieval.shards import read_summary
from run_scripts import encode
from run_scripts.encoding import cluster

# Ray gives a node 30 seconds to start, which is enough unless much more runs here than there are cores.
BUSY = os.getloadavg()[0] > 4 * (os.cpu_count() or 1)
HAS_RAY = importlib.util.find_spec("ray") is not None
RAY = ("--engine", "ray")


def needs_ray(test):
    busy = pytest.mark.skipif(BUSY, reason="too much runs on this machine for Ray to start in time")
    return busy(pytest.mark.skipif(not HAS_RAY, reason="the extra ray is not installed")(test))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As the workers have; Ray would also give way to every other process of the machine."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def two_cores():
    """The address of a cluster of one machine, on which two workers fit."""
    from ray.cluster_utils import Cluster

    cluster_of_one = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield cluster_of_one.address
    finally:
        cluster_of_one.shutdown()


def workers_here() -> list[psutil.Process]:
    """The processes of this test's workers."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # of one that has ended meanwhile
            if "".join(process.cmdline()[:1]).startswith("ray::Worker"):
                found.append(process)
    return found


@needs_ray
def test_two_workers_write_the_files_of_one_process_also_if_one_is_killed(start, monkeypatch, capsys):  # noqa: F811
    import ray

    encode.main(flags(start, "one"))
    seen, killed = set(), []
    count = encode.Progress.__call__

    def kill_one(progress, rows, is_new):
        count(progress, rows, is_new)
        seen.update(process.pid for process in workers_here())
        if not killed and len(seen) > 1:
            killed.append(min(seen))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(encode.Progress, "__call__", kill_one)
    with two_cores() as address:
        encode.main([*flags(start, "ray"), *RAY, "--ray_address", address])
    assert not ray.is_initialized()
    assert len(seen) >= 2
    assert killed
    assert "60 texts in 9 shards, 0 lines left out; 60 encoded here" in capsys.readouterr().out
    assert files(start / "ray") == files(start / "one")


@needs_ray
def test_a_run_on_this_machine_makes_what_is_missing(start, capfd):  # noqa: F811
    encode.main(flags(start, "one"))
    encode.main([*flags(start, "ray"), "--part", "1/3"])
    capfd.readouterr()
    encode.main([*flags(start, "ray"), *RAY])
    printed = capfd.readouterr()
    assert "39 encoded here" in printed.out
    assert len(printed.out.splitlines()) == 1
    assert not printed.err
    assert files(start / "ray") == files(start / "one")


def test_a_worker_refuses_another_model(start):  # noqa: F811
    encode.main(flags(start, "one"))
    settings = {name: value for name, value in read_summary(start / "one").items() if name not in ("rows", "shards")}
    (args,) = encode.cli.Parser((encode.EncodeArguments,)).parse(flags(start, "one"))
    for name in ("empty", "skipped"):
        del settings[name]
    assert cluster.Worker(vars(args), settings | {"model_name_or_path": "as it was written"}, 1).load() == 0
    with pytest.raises(ValueError, match=r"is not the model of this machine \(its weights differ\)"):
        cluster.Worker(vars(args), settings | {"weights": 0}, 1).load()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--engine", "spark"), "engine: 'spark' is unknown; choose one of local, ray"),
        (("--ray_address", "auto"), "ray_address: only --engine ray has it"),
        (("--ray_cpus", "2"), "ray_cpus: only --engine ray has it"),
        ((*RAY, "--ray_cpus", "0"), "ray_cpus: 0 is not allowed; use a whole number from 1"),
        (RAY, 'engine: Ray is missing; pip install "twodmse[ray]"'),
    ],
)
def test_wrong_flags_end_in_one_line(more, message, start, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda *names: None)
    with pytest.raises(SystemExit, match="2"):
        encode.main(flags(start, "out", *more))
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (start / "out").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://a:10001", "ray_address: 'ray://a:10001' is not allowed; write HOST:PORT, or auto"),
        ("127.0.0.1", "ray_address: '127.0.0.1' is not allowed"),
        ("127.0.0.1:1", "ray_address: 127.0.0.1:1 cannot be reached: "),
        ("127.0.0.1:99999", "ray_address: 127.0.0.1:99999 cannot be reached: "),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address, message, monkeypatch):
    args = encode.EncodeArguments("model", "texts.txt", "out", engine="ray", ray_address=address)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *names: "found")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        encode.check(args)


def test_ray_starts_its_own_workers():
    args = encode.EncodeArguments("model", "texts.txt", "out", engine="ray")
    with pytest.raises(ValueError, match="engine: ray starts its own workers; start encode"):
        encode._check_processes(args, 2)
