"""llama-index: `python with_llama_index.py FOLDER` with a plain export; package llama-index-embeddings-huggingface."""

import sys

from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from shared import TEXTS, report

folder = sys.argv[1]
model = HuggingFaceEmbedding(model_name=folder, device="cpu")
report(folder, model.get_text_embedding_batch(TEXTS))
report(folder, [model.get_query_embedding(text) for text in TEXTS])
