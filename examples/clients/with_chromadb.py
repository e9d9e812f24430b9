"""chromadb: `python with_chromadb.py FOLDER` with a plain export."""

import sys

import chromadb
from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction
from shared import TEXTS, report

folder = sys.argv[1]
embed = SentenceTransformerEmbeddingFunction(model_name=folder, device="cpu")
client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
collection = client.create_collection("texts", embedding_function=embed, metadata={"hnsw:space": "cosine"})
ids = [str(index) for index in range(len(TEXTS))]
collection.add(ids=ids, documents=TEXTS)
report(folder, collection.get(ids, include=["embeddings"])["embeddings"])
found = collection.query(query_texts=TEXTS, n_results=1)
assert [row[0] for row in found["ids"]] == ids
