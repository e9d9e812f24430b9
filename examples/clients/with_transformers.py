"""transformers: `python with_transformers.py FOLDER` with a plain export, whose backbone AutoModel loads."""

import sys

import torch
from shared import TEXTS, report
from transformers import AutoModel, AutoTokenizer

folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
pooled = (states * mask).sum(1) / mask.sum(1)
# The cut, which 2_Dense does in sentence-transformers, comes before the norm.
report(folder, torch.nn.functional.normalize(pooled[:, :64], dim=-1))
