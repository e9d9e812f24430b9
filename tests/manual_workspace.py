"""A folder with everything that README and manual name: tiny models under the names of real ones, and small files."""

import copy
import csv
import gzip
import json
from pathlib import Path

import torch
from conftest import SENTENCES
from tiny_vision import draw_picture
from transformers import AutoModel, BertConfig, RobertaConfig

from modeling_2dmse import TwoDMSEModel
from run_scripts.shared.output_dir import mark

ROOT = Path(__file__).resolve().parents[1]
LADDER = ["1x32", "2x64", "3x128", "4x192", "5x256", "6x384"]
# Models of the depth and width that the documents name, and thin inside.
_THIN = {"vocab_size": 160, "intermediate_size": 16, "max_position_embeddings": 514, "num_attention_heads": 12}
BACKBONES = {
    "sentence-transformers/all-MiniLM-L6-v2": BertConfig(hidden_size=384, num_hidden_layers=6, **_THIN),
    "FacebookAI/roberta-base": RobertaConfig(
        hidden_size=768, num_hidden_layers=12, pad_token_id=0, bos_token_id=2, eos_token_id=3, **_THIN
    ),
}
TEXTS = [f"{sentence} {number}" for number in range(5) for sentence in SENTENCES]


def make_workspace(folder: Path, tokenizer) -> Path:
    """Write it all."""
    (folder / "run_scripts").symlink_to(ROOT / "run_scripts")
    _write_models(folder, tokenizer)
    _write_texts(folder)
    _write_tables(folder)
    _write_beir(folder / "scifact")
    for part, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("red", "blue")):
            (folder / "pictures" / part / name).mkdir(parents=True)
            for index in range(count):
                draw_picture(label, index, 64).save(folder / "pictures" / part / name / f"{index}.png")
    return folder


def _write_models(folder: Path, tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 512  # as that of the real models, which the recipes need
    for name, config in BACKBONES.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = TwoDMSEModel.from_backbone(folder / next(iter(BACKBONES)), sizes=LADDER)
    for name in ("quickstart", "nli"):
        model.save_pretrained(folder / "out" / name)
        mark(str(folder / "out" / name), "finetune.py")  # as its output, which --overwrite may replace


def _write_texts(folder: Path) -> None:
    lines = "\n".join(TEXTS)
    (folder / "texts.txt").write_text(lines)
    for name in ("corpus.txt.gz", "valid.txt.gz"):
        _write_gz(folder / name, lines)
    rows = [json.dumps({"_id": f"d{number}", "title": "", "text": text}) for number, text in enumerate(TEXTS)]
    _write_gz(folder / "corpus.jsonl.gz", "\n".join(rows))


def _write_tables(folder: Path) -> None:
    pairs = list(zip(TEXTS[::2], TEXTS[1::2], strict=True))
    _write_csv(folder / "pairs.csv", ["anchor", "positive"], pairs)
    _write_gz(folder / "pairs.csv.gz", (folder / "pairs.csv").read_text())
    others = TEXTS[3::2] + TEXTS[1:2]
    triplets = [(*pair, other) for pair, other in zip(pairs, others, strict=True)]
    _write_csv(folder / "nli.csv", ["anchor", "positive", "negative"], triplets)
    _write_gz(folder / "nli.csv.gz", (folder / "nli.csv").read_text())
    scored = [(*pair, number % 6) for number, pair in enumerate(pairs[:24])]
    for name in ("stsb-dev", "stsb-test", "sts13", "sts14"):
        _write_csv(folder / f"{name}.csv", ["sentence1", "sentence2", "score"], scored)
    for name, rows in (("train", TEXTS[:80]), ("test", TEXTS[80:])):
        labelled = [(text, ("short", "long")[len(text) > 30]) for text in rows]
        _write_csv(folder / f"{name}.csv", ["text", "label"], labelled)


def _write_beir(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(SENTENCES)]
    queries = [{"_id": f"q{number}", "text": text} for number, text in enumerate(SENTENCES[:5])]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{number}\td{number + 1}\t1" for number in range(5))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))


def _write_csv(path: Path, header: list[str], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _write_gz(path: Path, text: str) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)
