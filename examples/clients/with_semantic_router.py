"""semantic-router: `python with_semantic_router.py FOLDER` with a plain export, by both encoders that read a folder."""

import sys

from semantic_router.encoders import HuggingFaceEncoder, LocalEncoder
from shared import TEXTS, report

folder = sys.argv[1]
# The first reads the backbone and pools by itself: it ignores 2_Dense, so that vectors have all dimensions.
for kind in (HuggingFaceEncoder, LocalEncoder):
    report(folder, kind(name=folder, device="cpu")(TEXTS))
