"""How time and memory grow: encoding and a training step over length, batch, layers and dims."""

import statistics
from functools import partial
from pathlib import Path

import torch

from modeling_2dmse import Size, TwoDMSEModel
from run_scripts.shared import models, plots
from run_scripts.shared.measure import allocated_at_peak, row, seconds
from trainer.losses import Rows
from trainer.objectives import Objective
from trainer.step_loss import plan_loss

WORK = ("encode", "train")
# The values that stay fixed while another quantity grows.
BASE = {"length": 128, "batch": 16}
LENGTHS, BATCHES = (32, 64, 128, 256, 512), (8, 16, 32, 64)


def growth_cost(args) -> list[dict]:
    """Seconds and GB of each kind of work at each value of each quantity; also draws OUTPUT_DIR/growth.png.

    The ratio of a row is the time at the largest value of the quantity over the time at its smallest.
    """
    model = models.to_device(
        models.load_encoder(args.model_name_or_path, args.sizes, trust_remote_code=args.trust_remote_code)
    )
    layers, width = model.num_layers, model.config.hidden_size
    base = BASE | {"layers": layers, "dims": width}
    dims = sorted({width >> i for i in range(4)} | {size.dim for size in model.config.ladder})
    values = {"length": LENGTHS, "batch": BATCHES, "layers": tuple(range(1, layers + 1)), "dims": tuple(dims)}
    rows = []
    for work in WORK:
        for name, points in values.items():
            taken, held = zip(*(_measure(model, work, base | {name: x}, args.runs) for x in points), strict=True)
            proportional = f"{points[-1] / points[0]:g} would be proportional"
            line = row(f"growth.{work}.{name}", proportional, taken[-1], taken[0])
            middle = [statistics.median(times) for times in taken]
            rows.append(line | {"x": points, "seconds": middle, "gb": held})
            print(f"{work} over {name}:", *(f"{x}: {s:.3g} s" for x, s in zip(points, middle, strict=True)), flush=True)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    draw(rows, Path(args.output_dir) / "growth.png", plots.public_name(args.model_name_or_path))
    return rows


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Plot seconds above and GB below, a column per quantity and a line per kind of work, on logarithmic axes."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line["id"].rsplit(".", 1)[1] for line in rows))
    figure = Figure(figsize=(3 * len(names), 5.5), layout="constrained")
    axes = figure.subplots(2, len(names), sharey="row", squeeze=False)
    for line in rows:
        _, work, name = line["id"].split(".")
        for axis, key in zip(axes[:, names.index(name)], ("seconds", "gb"), strict=True):
            axis.loglog(line["x"], line[key], marker="o", label=work, color=plots.COLORS[work])
            axis.set_xticks(line["x"], [str(x) for x in line["x"]], rotation=45 if len(line["x"]) > 5 else 0)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel(name)
    for axis, label in zip(axes[:, 0], ("seconds", "GB above the weights"), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend()
    figure.suptitle(title, fontsize=10)
    plots.save_picture(figure, path)


def _measure(model: TwoDMSEModel, work: str, shape: dict, runs: int) -> tuple[list[float], float]:
    """Seconds of each run, and GB above the weights at the peak."""
    call = partial(_encode if work == "encode" else _train, model, **shape)
    call()  # the first call allocates memory
    times = [seconds(call) for _ in range(runs)]
    if model.device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return times, (torch.cuda.max_memory_allocated() - held) / 1e9
    return times, allocated_at_peak(call) / 1e9


def _inputs(model: TwoDMSEModel, length: int, batch: int) -> dict[str, torch.Tensor]:
    words = min(20_000, model.config.backbone_config.vocab_size)
    ids = torch.randint(words // 20, words, (batch, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def _encode(model: TwoDMSEModel, length: int, batch: int, layers: int, dims: int) -> None:
    model.eval()
    model(**_inputs(model, length, batch), layers=[layers]).layer_embeddings[0, :, :dims]


def _train(model: TwoDMSEModel, length: int, batch: int, layers: int, dims: int) -> None:
    """Forward and backward at sizes up to the given one, with pairs of different texts."""
    model.train()
    ladder = [Size(n, max(1, dims * n // layers)) for n in range(1, layers + 1)]
    plan = Objective("starbucks", ladder, layers, model.config.hidden_size, alignment="score_kl").plan(None)
    states = model(**_inputs(model, length, batch), layers=plan.layers).layer_embeddings
    plan_loss(plan, states, Rows((batch // 2, batch // 2)), "infonce")[0].backward()
    model.zero_grad()
