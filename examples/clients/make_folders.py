"""Make the folders that the other files read: `python make_folders.py MODEL OUT` writes OUT/plain, OUT/onnx and OUT/cut
of 2 layers and 64 dimensions, OUT/whole, and OUT/reference.npy, the vectors of `model.encode`."""

import sys
from pathlib import Path

import numpy as np
from shared import TEXTS

from run_scripts.shared.models import load_encoder

model, out = load_encoder(sys.argv[1]), Path(sys.argv[2])
model.export(out / "plain", num_layers=2, dim=64)
model.export(out / "onnx", num_layers=2, dim=64, format="onnx", dtype="int8")
model.truncate(num_layers=2, dim=64).save_pretrained(out / "cut")
model.save_pretrained(out / "whole")
np.save(out / "reference.npy", model.encode(TEXTS, num_layers=2, dim=64))
