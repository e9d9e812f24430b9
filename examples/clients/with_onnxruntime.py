"""onnxruntime and tokenizers alone: `python with_onnxruntime.py FOLDER` with an ONNX export."""

import sys

import numpy as np
from onnxruntime import InferenceSession
from shared import TEXTS, report
from tokenizers import Tokenizer

folder = sys.argv[1]
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
rows = tokenizer.encode_batch(TEXTS)
given = {
    "input_ids": np.array([row.ids for row in rows]),
    "attention_mask": np.array([row.attention_mask for row in rows]),
    "token_type_ids": np.array([row.type_ids for row in rows]),
}
for name in ("model.onnx", "model_quantized.onnx"):
    session = InferenceSession(f"{folder}/onnx/{name}", providers=["CPUExecutionProvider"])
    report(folder, session.run(["sentence_embedding"], given)[0])
