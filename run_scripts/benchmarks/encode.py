"""Encoding: texts per second against sentence-transformers, in float32 and at the best precision, and by depth."""

import copy
from functools import partial
from pathlib import Path

import torch
from scipy.stats import spearmanr

from modeling_2dmse import Size, TwoDMSEModel
from run_scripts import common
from run_scripts.benchmarks import peer as peers
from run_scripts.benchmarks.measure import in_turn, row, seconds, write_profile
from trainer.arguments import cpu_has_bf16

BATCH = 32


def encode_cost(args, texts: list[str]) -> list[dict]:
    """Ratios of texts per second (`encode.fp32`, `encode.best`), and of time by depth (`encode.depth`).

    Args:
        args: the benchmark's arguments.
        texts: what is encoded.
    """
    peers.check_installed()
    name = common.resolve_model(args.model_name_or_path)
    model, peer = common.to_device(common.load_encoder(name, args.sizes)), peers.load_peer(name, args.max_length)
    peers.check_same_embeddings(model, peer, texts[:64], [Size(model.num_layers, model.config.hidden_size)])
    best, precision = best_precision(model)
    ours = partial(_encode, texts=texts, max_length=args.max_length)
    sides = {
        "ours": partial(seconds, partial(ours, model)),
        "theirs": partial(seconds, partial(peer.encode, texts, batch_size=BATCH)),
        "ours-best": partial(seconds, partial(ours, best)),
    }
    depths = {n: partial(seconds, partial(ours, model, num_layers=n)) for n in range(1, model.num_layers + 1)}
    if args.profile:
        write_profile(sides["ours"], Path(args.output_dir) / "profile-encode.txt")
    in_turn(1, sides)  # the first call pays for memory and threads
    taken = in_turn(args.runs, sides)
    by_depth = in_turn(args.runs, {f"{n} layers": side for n, side in depths.items()})
    full = by_depth[f"{model.num_layers} layers"]
    more = {"texts": len(texts), "batch": BATCH, "unit": "texts per second"}
    lines = [
        row("encode.fp32", ">= 1.3", taken["theirs"], taken["ours"], **more),
        row("encode.best", ">= 3", taken["theirs"], taken["ours-best"], **more, precision=precision,
            spearman=agreement(model, best, texts)),
    ]  # fmt: skip
    for n in range(1, model.num_layers):
        target = f"<= {n / model.num_layers + 0.10:.2f}"
        lines.append(row(f"encode.depth.{n}", target, by_depth[f"{n} layers"], full, texts=len(texts)))
    return lines


def best_precision(model: TwoDMSEModel) -> tuple[TwoDMSEModel, str]:
    """The model in bf16 where the device multiplies bf16 matrices, as it is elsewhere."""
    if model.device.type != "cpu" or cpu_has_bf16():
        return copy.deepcopy(model).to(torch.bfloat16), "bfloat16"
    return model, "float32"


def agreement(model: TwoDMSEModel, other: TwoDMSEModel, texts: list[str]) -> float:
    """Spearman correlation of the cosine similarities of neighbouring texts under two models."""
    similarities = []
    for side in (model, other):
        embeddings = side.encode(texts)
        similarities.append((embeddings[:-1] * embeddings[1:]).sum(axis=1))
    return float(spearmanr(*similarities).statistic)


def _encode(model: TwoDMSEModel, texts: list[str], max_length: int, num_layers: int | None = None) -> None:
    model.encode(texts, num_layers=num_layers, batch_size=BATCH, max_length=max_length, show_progress_bar=False)
