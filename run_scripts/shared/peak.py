"""The memory of a process that only searches an index, without torch.

`python -m run_scripts.shared.peak INDEX QUERIES.npy STAGES K` prints GB.
"""

import re
import resource
import sys
from pathlib import Path

import numpy as np

from retrieval import FunnelIndex, parse_stages


def process_peak() -> float:
    """The peak memory of this process in GB, including pages of mapped files."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak starts at that of the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(path: str, queries: str, stages: str, k: str) -> None:
    """Search the queries one after another, then all at once."""
    index, asked = FunnelIndex.open(path), np.load(queries)
    for query in [*asked, asked]:
        index.search(query, int(k), parse_stages(stages))
    print(process_peak())


if __name__ == "__main__":
    main(*sys.argv[1:])
