"""sentence-transformers: `python with_sentence_transformers.py FOLDER` with any of the folders."""

import sys

from sentence_transformers import SentenceTransformer
from shared import TEXTS, report

folder = sys.argv[1]
if folder.rstrip("/").endswith("onnx"):
    report(folder, SentenceTransformer(folder, backend="onnx").encode(TEXTS))
elif folder.rstrip("/").endswith("whole"):
    model = SentenceTransformer(folder, trust_remote_code=True)
    report(folder, model.encode(TEXTS, num_layers=2, truncate_dim=64))  # not of unit length
    report(folder, model.encode(TEXTS, num_layers=2, truncate_dim=64, normalize_embeddings=True))
else:
    report(folder, SentenceTransformer(folder, trust_remote_code=True).encode(TEXTS))
