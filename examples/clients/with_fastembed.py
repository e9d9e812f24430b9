"""fastembed: `python with_fastembed.py FOLDER` with an ONNX export, added as a model of the user's own."""

import sys

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from shared import TEXTS, report

folder = sys.argv[1]
TextEmbedding.add_custom_model(
    model="elastic",
    pooling=PoolingType.MEAN,
    normalization=True,
    sources=ModelSource(hf="elastic"),
    dim=64,
    model_file="onnx/model.onnx",
)
model = TextEmbedding("elastic", specific_model_path=folder)
report(folder, list(model.embed(TEXTS)))
