"""A GPU at work: encoding and training against one dense batch, sentence-transformers at its best, and depth by depth.

The model is a BERT-base with random weights, whose speed is that of trained ones, with the tokenizer of
`--model_name_or_path`. One process, which takes under five minutes of one H100: where a part has used up its time, no
further round of it begins, and its rows have fewer `runs`.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.tokens import tokenize
from run_scripts.benchmarks import train
from run_scripts.shared import models
from run_scripts.shared import peer as peers
from run_scripts.shared.measure import in_turn, row, seconds, wait

SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SIZES = ["2x32", "4x64", "6x128", "8x256", "10x512", "12x768"]
DENSE = (256, 128)
PEER_BATCHES = (128, 256, 512)
TRAIN_BATCHES = (128, 512)
MAX_LENGTH = 256
# Seconds after which no further round begins, for each of two sources, and for each of two batch sizes.
ENCODING_SECONDS, TRAINING_SECONDS = 40, 40


def gpu_cost(args, sources: dict[str, list[str]], rows: Dataset) -> list[dict]:
    """Tokens per second over those of a dense batch, texts per second over sentence-transformers', and training.

    Without a GPU it computes in float32 on the CPU, and `gpu.busy` is 0; a test does so with a tiny model.

    Args:
        args: the benchmark's arguments.
        sources: lists of texts by name, for example short and long ones.
        rows: anchors, positives and negatives to train on.
    """
    peers.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer = models.load_tokenizer(args.model_name_or_path, args.trust_remote_code)
        BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        lines = _encoding(folder, sources, args.runs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args = dataclasses.replace(args, model_name_or_path=folder, sizes=SIZES)
        return lines + [line for batch in TRAIN_BATCHES for line in _training(args, rows, batch)]


def _encoding(folder: str, sources: dict[str, list[str]], runs: int) -> list[dict]:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = models.to_device(TwoDMSEModel.from_backbone(folder, sizes=SIZES, dtype=dtype))
    peer = peers.load_peer(folder, MAX_LENGTH).to(dtype)
    dense = _dense_rate(model, runs)
    lines = []
    for name, texts in sources.items():
        count = int(tokenize(model.tokenizer, texts, MAX_LENGTH).lengths.sum())
        long = name == "documents"
        ours = partial(model.encode, texts, max_length=MAX_LENGTH, show_progress_bar=False)
        theirs = {f"theirs {size}": partial(peer.encode, texts, batch_size=size) for size in PEER_BATCHES}
        timed = {side: partial(seconds, call) for side, call in {"ours": ours, **theirs}.items()}
        in_turn(1, timed)  # allocates memory and plans kernels
        until = time.perf_counter() + ENCODING_SECONDS
        taken = in_turn(runs, timed, until - ENCODING_SECONDS / 2)
        best = min((taken[side] for side in theirs), key=statistics.median)
        rates = [count / value for value in taken["ours"]]
        limit, least = (">= 0.7", ">= 3") if long else (">= 0.6", ">= 6")
        lines.append(row(f"gpu.encode.limit.{name}", limit, rates, [dense] * len(rates), tokens=count, dense=dense))
        lines.append(row(f"gpu.encode.{name}", least, best, taken["ours"], texts=len(texts), seconds=taken))
        lines.append(_depth(name, model.num_layers, ours, runs, until))
        with _profiler() as profiler:
            ours()
            wait()
        lines.append(_busy(name, profiler, statistics.median(taken["ours"])))
    return lines


def _depth(name: str, layers: int, encode: Callable, runs: int, until: float) -> dict:
    """Time at n layers over time at all, less n / all; the worst n of each run."""
    calls = {f"{n} layers": partial(seconds, partial(encode, num_layers=n)) for n in range(1, layers + 1)}
    taken = in_turn(runs, calls, until)
    *parts, whole = taken.values()
    rounds = range(len(whole))
    excess = [max(part[i] / whole[i] - n / layers for n, part in enumerate(parts, 1)) for i in rounds]
    return row(f"gpu.depth.{name}", "<= 0.10", excess, [1.0] * len(rounds), seconds=taken)


def _dense_rate(model: TwoDMSEModel, runs: int) -> float:
    """Tokens per second of the backbone on one batch without padding, on the device already."""
    ids = torch.randint(1, model.config.backbone_config.vocab_size, DENSE, device=model.device)
    with torch.inference_mode():
        run = lambda: [model.backbone(ids) for _ in range(10)]
        run()
        return max(10 * ids.numel() / seconds(run) for _ in range(runs))


def _training(args, rows: Dataset, batch: int) -> list[dict]:
    rate, whole = partial(train.rate, batch=batch), {"objective": "separate", "sizes": args.sizes[-1:]}
    bf16 = torch.cuda.is_available()
    sides: dict[str, Callable[[], float]] = {
        "ours": partial(rate, train.ours, args, rows),
        "ours one size": partial(rate, train.ours, args, rows, **whole),
        "theirs one size": partial(rate, train.theirs, args, rows, whole=None, bf16=bf16),
        "theirs every cell": partial(rate, train.theirs, args, rows, whole=True, bf16=bf16),
    }
    rates = in_turn(args.runs, sides, time.perf_counter() + TRAINING_SECONDS)
    clock = ProfilingClock()
    train.ours(args, rows, clock, batch=batch).train()
    taken = train.STEPS * batch / statistics.median(rates["ours"])
    more = {"batch": batch, "samples_per_second": rates}
    return [
        row(f"gpu.train.one_size.{batch}", ">= 3", rates["ours"], rates["theirs one size"], **more),
        row(f"gpu.train.every_cell.{batch}", ">= 10", rates["ours"], rates["theirs every cell"], batch=batch),
        row(f"gpu.ladder_cost.{batch}", "<= 1.15", rates["ours one size"], rates["ours"], batch=batch),
        _busy(f"train.{batch}", clock.profiler, taken),
    ]


class ProfilingClock(train.Clock):
    """A clock that also profiles the steps that it measures."""

    def __init__(self):
        super().__init__()
        self.profiler = _profiler()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if len(self.marks) == train.WARM_UP:
            self.profiler.start()
        elif len(self.marks) == train.WARM_UP + train.STEPS:
            self.profiler.stop()


def _profiler() -> profile:
    # Only the GPU's activity: recording the host's would slow it down, and the GPU would wait for it.
    return profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU])


def _busy(name: str, profiler: profile, taken: float) -> dict:
    """The share of the time in which the GPU computes.

    Args:
        name: what was profiled.
        profiler: after the work.
        taken: seconds of the same work without the profiler, which slows down the host but not the kernels.
    """
    return row(f"gpu.busy.{name}", "none", [computing(profiler.events())], [taken])


def computing(events: Iterable[FunctionEvent]) -> float:
    """Seconds in which at least one kernel runs; copies and annotations are not counted.

    Kernels of several streams may overlap, and events of the host that launch kernels have the kernels' time too. So
    the durations are not simply added.
    """
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    )
    total, reached = 0.0, float("-inf")
    for start, end in kernels:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def sources_of(args, texts: list[str], tasks: list) -> dict[str, list[str]]:
    """The lines of `--texts` as short texts, and the documents of the BEIR folders."""
    documents = [text for task in tasks if hasattr(task, "corpus") for text in task.corpus.values()]
    named = Path(args.texts).stem if args.texts else "texts"
    return {named: texts} | ({"documents": documents} if documents else {})
