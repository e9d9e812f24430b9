"""The version of transformers that is installed, read without importing it: an old one has neither the names that the
scripts import nor, perhaps, the packages that it needs."""

import importlib.util
import os
import re
import sys
from pathlib import Path


def check_transformers() -> None:
    """End the program with one line, as `cli.fail` does, if transformers is older than 5."""
    found = importlib.util.find_spec("transformers")
    text = Path(found.origin).read_text(encoding="utf-8") if found is not None and found.origin else ""
    version = re.search(r"^__version__ = [\"']((\d+)\.[^\"']*)", text, re.MULTILINE)
    if version is None or int(version[2]) >= 5:
        return
    if int(os.environ.get("RANK", "0")) == 0:
        line = f"2DMSE models need transformers 5 or newer, not {version[1]}; upgrade transformers"
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    raise SystemExit(2)
