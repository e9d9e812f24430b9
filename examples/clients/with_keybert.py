"""KeyBERT: `python with_keybert.py FOLDER` with a plain export."""

import sys

from keybert import KeyBERT
from keybert.backend._utils import select_backend
from sentence_transformers import SentenceTransformer
from shared import TEXTS, report

folder = sys.argv[1]
model = SentenceTransformer(folder, device="cpu")
report(folder, select_backend(model).embed(TEXTS))
print(KeyBERT(model).extract_keywords(TEXTS[0], top_n=2))
