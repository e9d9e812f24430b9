"""setfit: `python with_setfit.py FOLDER` with a plain export; a classifier on its vectors, without training of them."""

import sys

from setfit import SetFitModel
from shared import TEXTS, report

folder = sys.argv[1]
model = SetFitModel.from_pretrained(folder, device="cpu")
vectors = model.encode(TEXTS)
report(folder, vectors)
model.model_head.fit(vectors, [0, 0, 1, 1])
assert model.predict(TEXTS).tolist() == [0, 0, 1, 1]
