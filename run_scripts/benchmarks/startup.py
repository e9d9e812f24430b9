"""Startup: from the start of Python to the first embedding, with the model on disk."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from run_scripts.shared import models
from run_scripts.shared import peer as peers
from run_scripts.shared.measure import in_turn, row, seconds

OURS = "from modeling_2dmse import TwoDMSEModel as Model; Model.from_pretrained({!r}, {}).encode('a short text')"
THEIRS = "from sentence_transformers import SentenceTransformer as Model; Model({!r}, {}).encode('a short text')"


def startup_cost(args) -> list[dict]:
    """Time that a new process takes, ours over that of sentence-transformers."""
    peers.check_installed()
    name, trust = models.resolve_model(args.model_name_or_path), args.trust_remote_code
    flag = f"trust_remote_code={trust}"
    with tempfile.TemporaryDirectory() as folder:
        models.load_encoder(name, args.sizes, trust_remote_code=trust).save_pretrained(folder)
        sides = {
            "ours": partial(seconds, partial(_run, OURS.format(folder, flag))),
            "theirs": partial(seconds, partial(_run, THEIRS.format(name, flag))),
        }
        in_turn(1, sides)  # the first call reads from the disk
        taken = in_turn(args.runs, sides)
    return [row("startup", "<= 1", taken["ours"], taken["theirs"], seconds=taken)]


def _run(code: str) -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
