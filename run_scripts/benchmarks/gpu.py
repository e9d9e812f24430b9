"""A GPU at work: encoding and training against one dense batch, sentence-transformers at its best, and depth by depth.

The model is a BERT-base with random weights, whose speed is that of trained ones, with the tokenizer of
`--model_name_or_path`. In float32 without a GPU, to try the script. One process, under five minutes on one H100.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, BertConfig, BertModel

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.tokens import tokenize
from run_scripts.benchmarks import train
from run_scripts.shared import models
from run_scripts.shared import peer as peers
from run_scripts.shared.measure import in_turn, row, seconds

SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SIZES = ["2x32", "4x64", "6x128", "8x256", "10x512", "12x768"]
DENSE = (256, 128)
PEER_BATCHES = (32, 128, 512)
TRAIN_BATCHES = (128, 512)
MAX_LENGTH = 256


def gpu_cost(args, sources: dict[str, list[str]], rows: Dataset) -> list[dict]:
    """Tokens per second over those of a dense batch, texts per second over sentence-transformers', and training.

    Args:
        args: the benchmark's arguments.
        sources: lists of texts by name, for example short and long ones.
        rows: anchors, positives and negatives to train on.
    """
    peers.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(models.resolve_model(args.model_name_or_path))
        BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        lines = _encoding(folder, sources, args.runs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return lines + _training(args, folder, rows)


def _encoding(folder: str, sources: dict[str, list[str]], runs: int) -> list[dict]:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = models.to_device(TwoDMSEModel.from_backbone(folder, sizes=SIZES, dtype=dtype))
    peer = peers.load_peer(folder, MAX_LENGTH).to(dtype)
    dense = _dense_rate(model, runs)
    lines = []
    for name, texts in sources.items():
        count = int(tokenize(model.tokenizer, texts, MAX_LENGTH).lengths.sum())
        ours = partial(model.encode, texts, max_length=MAX_LENGTH, show_progress_bar=False)
        theirs = {f"theirs {size}": partial(peer.encode, texts, batch_size=size) for size in PEER_BATCHES}
        depths = {n: partial(ours, num_layers=n) for n in range(1, model.num_layers)}
        ours()
        theirs[f"theirs {PEER_BATCHES[-1]}"]()
        taken = in_turn(runs, {side: partial(seconds, call) for side, call in {"ours": ours, **theirs}.items()})
        best = min((taken[side] for side in theirs), key=min)
        rates = [count / value for value in taken["ours"]]
        lines.append(row(f"gpu.encode.limit.{name}", ">= 0.6", rates, [dense] * runs, tokens=count, dense=dense))
        lines.append(row(f"gpu.encode.{name}", ">= 3", best, taken["ours"], texts=len(texts), seconds=taken))
        taken = in_turn(
            runs, {str(n): partial(seconds, call) for n, call in {**depths, model.num_layers: ours}.items()}
        )
        whole = taken[str(model.num_layers)]
        excess = [max(taken[str(n)][i] / whole[i] - n / model.num_layers for n in depths) for i in range(runs)]
        lines.append(row(f"gpu.depth.{name}", "<= 0.10", excess, [1.0] * runs, seconds=taken))
        lines.append(row(f"gpu.busy.{name}", "none", [_busy(ours)], [1.0]))
    return lines


def _dense_rate(model: TwoDMSEModel, runs: int) -> float:
    """Tokens per second of the backbone on one batch without padding, on the device already."""
    ids = torch.randint(1, model.config.backbone_config.vocab_size, DENSE, device=model.device)
    with torch.inference_mode():
        run = lambda: [model.backbone(ids) for _ in range(10)]
        run()
        return max(10 * ids.numel() / seconds(run) for _ in range(runs))


def _training(args, folder: str, rows: Dataset) -> list[dict]:
    args.model_name_or_path, args.sizes = folder, SIZES
    lines = []
    one = {"objective": "separate", "sizes": SIZES[-1:]}
    for batch in TRAIN_BATCHES:
        rate = partial(train.rate, batch=batch)
        sides: dict[str, Callable[[], float]] = {
            "ours": partial(rate, train.ours, args, rows),
            "ours one size": partial(rate, train.ours, args, rows, **one),
            "theirs one size": partial(rate, train.theirs, args, rows, whole=None, bf16=torch.cuda.is_available()),
            "theirs every cell": partial(rate, train.theirs, args, rows, whole=True, bf16=torch.cuda.is_available()),
        }
        rates = in_turn(args.runs, sides)
        more = {"batch": batch, "samples_per_second": rates}
        lines += [
            row(f"gpu.train.one_size.{batch}", ">= 3", rates["ours"], rates["theirs one size"], **more),
            row(f"gpu.train.every_cell.{batch}", ">= 10", rates["ours"], rates["theirs every cell"], batch=batch),
            row(f"gpu.ladder_cost.{batch}", "<= 1.15", rates["ours one size"], rates["ours"], batch=batch),
        ]
    return lines


def _busy(call: Callable[[], object]) -> float:
    """The share of a call's time in which the GPU computes; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        taken = seconds(call)
    return sum(event.device_time for event in profiler.events()) / 1e6 / taken


def sources_of(args, texts: list[str], tasks: list) -> dict[str, list[str]]:
    """The lines of `--texts` as short texts, and the documents of the BEIR folders."""
    documents = [text for task in tasks if hasattr(task, "corpus") for text in task.corpus.values()]
    named = Path(args.texts).stem if args.texts else "texts"
    return {named: texts} | ({"documents": documents} if documents else {})
