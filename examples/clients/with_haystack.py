"""haystack: `python with_haystack.py FOLDER` with a plain export. pip install sentence-transformers-haystack"""

import sys

from haystack import Document
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)
from shared import TEXTS, report

folder = sys.argv[1]
for_documents = SentenceTransformersDocumentEmbedder(model=folder, progress_bar=False)
for_texts = SentenceTransformersTextEmbedder(model=folder, progress_bar=False)
for embedder in (for_documents, for_texts):
    embedder.warm_up()
documents = for_documents.run([Document(content=text) for text in TEXTS])["documents"]
report(folder, [document.embedding for document in documents])
report(folder, [for_texts.run(text)["embedding"] for text in TEXTS])
