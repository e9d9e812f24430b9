"""FAISS: `python with_faiss.py FOLDER` with a plain export; inner products of unit vectors are cosines."""

import sys

import faiss
from sentence_transformers import SentenceTransformer
from shared import TEXTS, report

folder = sys.argv[1]
vectors = SentenceTransformer(folder, device="cpu").encode(TEXTS)
index = faiss.IndexFlatIP(vectors.shape[1])
index.add(vectors)
scores, found = index.search(vectors, 1)
assert found[:, 0].tolist() == list(range(len(TEXTS)))
assert abs(scores - 1).max() < 1e-5
report(folder, index.reconstruct_n(0, len(TEXTS)))
