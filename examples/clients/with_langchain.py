"""langchain: `python with_langchain.py FOLDER` with a plain export. pip install langchain-huggingface"""

import sys

from langchain_huggingface import HuggingFaceEmbeddings
from shared import TEXTS, report

folder = sys.argv[1]
model = HuggingFaceEmbeddings(model_name=folder, model_kwargs={"device": "cpu"})
report(folder, model.embed_documents(TEXTS))
report(folder, [model.embed_query(text) for text in TEXTS])
