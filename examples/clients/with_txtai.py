"""txtai: `python with_txtai.py FOLDER` with a plain export, by its default and through sentence-transformers."""

import sys

from shared import TEXTS, report
from txtai.vectors import VectorsFactory

folder = sys.argv[1]
# The default reads the backbone and pools by itself: it ignores 2_Dense, so that vectors have all dimensions.
for settings in ({}, {"method": "sentence-transformers"}):
    vectors = VectorsFactory.create({"path": folder, "gpu": False, **settings}, None)
    report(folder, vectors.batchtransform([(None, text, None) for text in TEXTS]))
