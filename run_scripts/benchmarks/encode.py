"""Encoding: texts per second against sentence-transformers in float32 and at the best precision, and time by depth."""

import copy
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers.utils import is_flash_attn_2_available

from modeling_2dmse import Size, TwoDMSEModel
from modeling_2dmse.batching import CPU_TOKENS, pooled_states
from run_scripts.shared import peer as peers
from run_scripts.shared.measure import in_turn, row, seconds, write_profile
from trainer.evaluation import StsData, evaluate_sts
from trainer.shared.arguments import cpu_has_bf16

BATCH = 32
# Texts of a call in which batches cannot be filled with texts of one length.
PART = 64
# The most that a precision may change the Spearman of any task.
TOLERANCE = 0.001


class OnnxEncoder:
    """The model that `export(format="onnx")` writes, with the encoding methods of a [`TwoDMSEModel`]."""

    def __init__(self, model: TwoDMSEModel, folder: str, dtype: str):
        import onnxruntime

        model.export(folder, format="onnx", dtype=dtype)
        self.config, self.tokenizer, self.max_length = model.config, model.tokenizer, model.max_length
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # it does not read OMP_NUM_THREADS
        providers = onnxruntime.get_available_providers()
        path = Path(folder) / "onnx" / ("model_quantized.onnx" if dtype == "int8" else "model.onnx")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def encode(self, texts: Sequence[str], **kwargs) -> np.ndarray:
        """(len(texts), dim) unit vectors."""
        return self.encode_states(texts, **kwargs)[0].numpy()

    def encode_states(
        self,
        texts: Sequence[str],
        layers: Sequence[int] | None = None,
        batch_size: int = BATCH,
        max_length: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> torch.Tensor:
        """(1, len(texts), dim) embeddings, of the one size that was exported."""
        length = min(max_length or self.max_length, self.max_length)
        return pooled_states(
            self._run, self.tokenizer, texts, length, CPU_TOKENS, batch_size, show_progress_bar=show_progress_bar
        )

    def _run(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        zeros = torch.zeros_like(batch["input_ids"])  # a batch lacks its token types if they are all 0
        inputs = {key: batch.get(key, zeros).numpy() for key in self.inputs}
        (vectors,) = self.session.run(["sentence_embedding"], inputs)
        return torch.from_numpy(vectors)[None]


def encode_cost(args, texts: list[str], tasks: list[StsData], folder: str) -> list[dict]:
    """Ratios of texts per second (`encode.fp32`, `encode.best`, `encode.packed`) and of time by depth (`encode.depth`).

    Args:
        args: the benchmark's arguments.
        texts: what is encoded.
        tasks: sentence pairs that show what a precision costs; without them, only float32 is measured.
        folder: an empty folder for exports.
    """
    peers.check_installed()
    model, peer = peers.load_both(args)
    full = Size(model.num_layers, model.config.hidden_size)
    peers.check_same_embeddings(model, peer, texts[:64], [full])
    ways = {"float32": model} | (precisions(model, folder) if tasks else {})
    lost = {way: spearman_lost(encoder, model, tasks, full, args.max_length) for way, encoder in ways.items()}
    options = {"max_length": args.max_length, "batch_size": BATCH, "show_progress_bar": False}
    calls = {way: partial(encoder.encode, texts, **options) for way, encoder in ways.items()}
    calls["theirs"] = partial(peer.encode, texts, batch_size=BATCH)
    if args.profile:
        write_profile(calls["float32"], Path(args.output_dir) / "profile-encode.txt")
    in_turn(1, {way: partial(seconds, call) for way, call in calls.items()})  # allocates memory and starts threads
    taken = in_turn(args.runs, {way: partial(seconds, call) for way, call in calls.items()})
    more = {"texts": len(texts), "batch": BATCH}
    lines = [row("encode.fp32", ">= 1.4", taken["theirs"], taken["float32"], **more)]
    for way in list(ways)[1:]:
        line = row(f"encode.{way}", "none", taken["theirs"], taken[way], **more, spearman_lost=lost[way])
        lines.append(line)
    best = max((line for line in lines if line.get("spearman_lost", 0) <= TOLERANCE), key=lambda line: line["ratio"])
    lines.append(best | {"id": "encode.best", "target": ">= 4", "precision": best["id"].removeprefix("encode.")})
    return [*lines, *packed_rows(model, texts, args.runs, options), *depth_rows(model, texts, args.runs, options)]


def packed_rows(model: TwoDMSEModel, texts: list[str], runs: int, options: dict) -> list[dict]:
    """Time with padded batches over time with packed rows, a call for every 64 texts; none for a model that pads."""
    if not model.packs:
        return []
    padded = copy.deepcopy(model)
    padded._packs = False
    parts = [texts[first : first + PART] for first in range(0, len(texts), PART)]
    call = lambda side: [side.encode(part, **options) for part in parts]
    sides = {"padded": partial(call, padded), "packed": partial(call, model)}
    taken = in_turn(runs, {name: partial(seconds, side) for name, side in sides.items()})
    return [row("encode.packed", ">= 1", taken["padded"], taken["packed"], texts=len(texts), part=PART)]


def depth_rows(model: TwoDMSEModel, texts: list[str], runs: int, options: dict) -> list[dict]:
    """Time at n layers over time at all N, which should be n/N, and the largest excess over n/N."""
    count = model.num_layers
    calls = {n: partial(model.encode, texts, num_layers=n, **options) for n in range(1, count + 1)}
    taken = in_turn(runs, {f"{n} layers": partial(seconds, call) for n, call in calls.items()})
    whole = taken[f"{count} layers"]
    lines = [
        row(f"encode.depth.{n}", f"<= {n / count + 0.10:.2f}", taken[f"{n} layers"], whole) for n in range(1, count)
    ]
    shares = [[taken[f"{n} layers"][i] / whole[i] - n / count for n in range(1, count)] for i in range(runs)]
    worst = row("encode.depth", "<= 0.10", [max(share, default=0.0) for share in shares], [1.0] * runs)
    return [worst, *lines]


def precisions(model: TwoDMSEModel, folder: str) -> dict[str, TwoDMSEModel | OnnxEncoder]:
    """The model in other precisions and runtimes that may be faster on this machine, by name."""
    ways = {}
    if model.device.type != "cpu" or cpu_has_bf16():
        ways["bf16"] = copy.deepcopy(model).to(torch.bfloat16)
    if model.device.type == "cuda" and is_flash_attn_2_available():
        ways["bf16_flash"] = copy.deepcopy(ways["bf16"])
        ways["bf16_flash"].set_attn_implementation("flash_attention_2")
    if model.device.type == "cpu" and importlib.util.find_spec("onnxruntime"):
        for dtype in ("float32", "int8"):
            ways[f"onnx_{dtype}"] = OnnxEncoder(model, str(Path(folder) / dtype), dtype)
    return ways


def spearman_lost(encoder, model: TwoDMSEModel, tasks: list[StsData], size: Size, max_length: int) -> float:
    """The largest difference over tasks between an encoder's Spearman and the model's."""
    if encoder is model:
        return 0.0
    options = {"max_length": max_length, "show_progress_bar": False}
    scores = [
        [evaluate_sts(side, task, [size], **options)["spearman"][str(size)] for task in tasks]
        for side in (encoder, model)
    ]
    return max(abs(a - b) for a, b in zip(*scores, strict=True))
