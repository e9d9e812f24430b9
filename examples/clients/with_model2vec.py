"""model2vec: `python with_model2vec.py FOLDER` with a plain export, whose backbone is distilled to static vectors."""

import sys

from model2vec.distill import distill_from_model
from shared import TEXTS, report
from transformers import AutoModel, AutoTokenizer

folder = sys.argv[1]
static = distill_from_model(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), pca_dims=32)
# Vectors of another model, so that there is nothing to compare; the backbone is read without its cut.
report(folder, static.encode(TEXTS))
