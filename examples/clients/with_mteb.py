"""mteb: `python with_mteb.py FOLDER` with a plain export; no task is run, which would download its data."""

import sys

import mteb
from datasets import Dataset
from mteb.types import PromptType
from shared import TEXTS, report
from torch.utils.data import DataLoader

folder = sys.argv[1]
model = mteb.SentenceTransformerEncoderWrapper(folder, device="cpu")  # mteb.get_model reads registered names only
task = mteb.get_task("STS12")
loader = DataLoader(Dataset.from_dict({"text": TEXTS}), batch_size=2)
where = {"hf_split": "test", "hf_subset": "default", "prompt_type": PromptType.document}
report(folder, model.encode(loader, task_metadata=task.metadata, **where))
