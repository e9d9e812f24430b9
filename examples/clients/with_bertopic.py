"""BERTopic: `python with_bertopic.py FOLDER` with a plain export; two clusters of a few texts."""

import sys

from bertopic import BERTopic
from bertopic.backend._utils import select_backend
from bertopic.dimensionality import BaseDimensionalityReduction
from sentence_transformers import SentenceTransformer
from shared import TEXTS, report
from sklearn.cluster import KMeans

folder = sys.argv[1]
model = SentenceTransformer(folder, device="cpu")
report(folder, select_backend(model).embed_documents(TEXTS))
topics = BERTopic(
    embedding_model=model, umap_model=BaseDimensionalityReduction(), hdbscan_model=KMeans(2), min_topic_size=2
)
assert len(set(topics.fit_transform(TEXTS * 3)[0])) == 2
