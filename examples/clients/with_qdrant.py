"""qdrant-client in memory: `python with_qdrant.py FOLDER` with a plain export."""

import sys

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams
from sentence_transformers import SentenceTransformer
from shared import TEXTS, report

folder = sys.argv[1]
vectors = SentenceTransformer(folder, device="cpu").encode(TEXTS)
client = QdrantClient(":memory:")
client.create_collection("texts", VectorParams(size=vectors.shape[1], distance=Distance.COSINE))
client.upsert("texts", [PointStruct(id=index, vector=row.tolist()) for index, row in enumerate(vectors)])
for index, row in enumerate(vectors):
    assert client.query_points("texts", query=row.tolist(), limit=1).points[0].id == index
points = client.retrieve("texts", list(range(len(TEXTS))), with_vectors=True)
report(folder, [point.vector for point in points])
