"""optimum: `python with_optimum.py FOLDER` with an ONNX export. pip install "optimum-onnx[onnxruntime]" """

import sys

import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction
from shared import TEXTS, report
from transformers import AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForFeatureExtraction.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
pooled = (states * mask).sum(1) / mask.sum(1)
report(folder, torch.nn.functional.normalize(pooled, dim=-1))
