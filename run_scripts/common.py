"""What the scripts share: recipes and flags, errors in one line, loading a model, tables and pictures."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, TrainingArguments

from modeling_2dmse import Size, StarbucksConfig, TwoDMSEConfig, TwoDMSEModel
from trainer import checkpoints
from trainer.checkpoints import SaveError, save_error
from trainer.evaluation import main_scores

from .quickstart import MODEL_NAME, minilm_path

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class OverwriteArguments:
    """What every training is asked about its output folder."""

    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace an output folder that holds another run; it is moved aside, and deleted when the "
                  "new run has ended well."},
    )  # fmt: skip


class Parser(HfArgumentParser):
    """HfArgumentParser with a YAML recipe as the first argument; flags override the recipe."""

    def __init__(self, dataclass_types, default_recipe: str | None = None, **kwargs):
        kwargs.setdefault("usage", "%(prog)s [RECIPE.yaml] [--flag value ...]")
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.default_recipe = default_recipe

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """The dataclasses, filled from recipe and flags; without any argument, from the default recipe."""
        argv = list(sys.argv[1:] if argv is None else argv)
        recipe = self.default_recipe if not argv else None
        if argv and not argv[0].startswith("-"):
            recipe = argv.pop(0)
        flags = [*(recipe_flags(recipe) if recipe else []), *argv]
        *parsed, unknown = self.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"flags: {' '.join(unknown)} is unknown; --help lists what there is")
        return tuple(parsed)

    def error(self, message):
        fail(message)


def fail(message) -> None:
    """End the program with one line on stderr and exit code 2."""
    if int(os.environ.get("RANK", "0")) == 0:
        line = " ".join(str(message).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors():
    """Around the work before training starts: wrong input ends in one line, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def resolve_model(name_or_path: str) -> str:
    """The folder or Hub name of a model; ValueError for what looks like a folder and holds no model."""
    if name_or_path == MODEL_NAME:
        name_or_path = minilm_path()
    looks_like_a_path = name_or_path.startswith((".", os.sep)) or name_or_path.count("/") > 1
    if looks_like_a_path and not os.path.isdir(name_or_path):
        raise ValueError(f"model_name_or_path: {name_or_path} does not exist")
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise ValueError(f"model_name_or_path: {name_or_path} holds no config.json, so it is not a model")
    return name_or_path


def load_encoder(name_or_path: str, sizes=None, pooling: str | None = None, **kwargs) -> TwoDMSEModel:
    """A TwoDMSE folder or repository as it is, any other text encoder as the backbone of a new elastic model."""
    name_or_path = resolve_model(name_or_path)
    if os.path.isfile(os.path.join(name_or_path, "adapter_config.json")):
        return load_adapter(name_or_path)
    kind = read_config(name_or_path, **kwargs).model_type
    if kind == StarbucksConfig.model_type:
        raise ValueError(f"model_name_or_path: {name_or_path} is a pre-training model; use {name_or_path}/encoder")
    if kind == TwoDMSEConfig.model_type:
        model = TwoDMSEModel.from_pretrained(name_or_path, **kwargs)
        if pooling is not None and pooling != model.config.pooling:
            raise ValueError(f"pooling: {pooling} is not what {name_or_path} was trained with ({model.config.pooling})")
        return model
    return TwoDMSEModel.from_backbone(name_or_path, sizes=sizes, pooling=pooling, **kwargs)


def read_config(name_or_path: str, **kwargs) -> PreTrainedConfig:
    """The configuration of a model; ValueError where there is none."""
    hub = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    try:
        return AutoConfig.from_pretrained(name_or_path, **hub)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model_name_or_path: {name_or_path} is no folder, and the Hub does not give it: {reason}"
        ) from error


def fingerprint(model: TwoDMSEModel) -> int:
    """A checksum of the weights: another one after any further training."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return value


def to_device(model: TwoDMSEModel) -> TwoDMSEModel:
    """The model on the GPU, where there is one: for scripts that no Trainer places it for."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def load_adapter(folder: str) -> TwoDMSEModel:
    """The model of a LoRA checkpoint, its adapter merged into the weights of the model that it adapts."""
    from peft import PeftConfig, PeftModel

    config = TwoDMSEConfig.from_pretrained(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    encoder = load_encoder(base, config.sizes)
    encoder.config.pooling = config.pooling
    if encoder.num_layers > config.num_layers:
        encoder = encoder.truncate(config.num_layers, config.dim)
    if config.exit_projections:
        encoder.add_exit_projections()
    merged = PeftModel.from_pretrained(encoder, folder).merge_and_unload()
    merged.config.set_ladder(config.sizes)
    return merged.eval()


def check_output_dir(path: str, allowed: bool) -> None:
    """ValueError if the folder holds files of another run."""
    if os.path.isfile(path):
        raise ValueError(f"output_dir: {path} is a file")
    if os.path.isdir(path) and os.listdir(path) and not allowed:
        raise ValueError(
            f"output_dir: {path} is not empty; choose another folder, pass --overwrite to replace it, or "
            "--resume_from_checkpoint true to go on"
        )


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names, `true` being the newest complete one of the output folder."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        found = [checkpoints.find_checkpoint(args.output_dir, args.world_size)]
        broadcast_object_list(found)  # processes that went on from different steps would wait for each other for ever
        newest = found[0]
        if newest is None:
            raise ValueError(f"resume_from_checkpoint: {args.output_dir} holds no complete checkpoint to go on from")
        return newest
    if not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint: {wanted} does not exist")
    fault = checkpoints.find_fault(wanted, args.world_size)
    if fault is not None:
        raise ValueError(f"resume_from_checkpoint: {wanted} cannot be gone on from: {fault}")
    return wanted


@contextlib.contextmanager
def training_errors(trainer):
    """Around training: what stops it ends in one line that says how to go on."""
    try:
        yield
    except (FloatingPointError, SaveError) as error:
        fail(error)
    except (OSError, SafetensorError) as error:
        fail(save_error(error, "the model", trainer.args.output_dir))
    number = trainer.stop_signals.received
    if number is not None:
        name, step = signal.Signals(number).name, trainer.state.global_step
        say(f"\nStopped by {name} after step {step}; go on with --resume_from_checkpoint true")
        raise SystemExit(128 + number)


def move_aside(args: TrainingArguments) -> str | None:
    """Move an earlier run's folder away, so that a failure of the new run cannot cost it."""
    previous, folder = None, args.output_dir.rstrip(os.sep)
    with args.main_process_first(local=False, desc="moving the earlier run aside"):
        if args.process_index == 0 and os.path.isdir(folder) and os.listdir(folder):
            previous = f"{folder}.previous-{time.strftime('%Y%m%d-%H%M%S')}"
            os.rename(folder, previous)
            os.makedirs(folder)
            say(f"the earlier run is kept in {previous} until this one has ended well")
    return previous


def remove(folder: str | None) -> None:
    """Delete the earlier run that `move_aside` kept."""
    if folder is not None:
        shutil.rmtree(folder)


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


def use_all_cores() -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 where it is not told otherwise; one process may use every core."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available()
    if alone and torch.get_num_threads() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def write_json(path: str | Path, content) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(partial, path)


def score_table(columns: dict[str, dict[str, float]], sizes: Sequence[Size], header: str) -> str:
    """A text table, a row a size: `columns` maps a title to {size: score}."""
    lines = [f"{header:<10}" + "".join(f"{title:>14}" for title in columns)]
    for size in sizes:
        lines.append(f"{size!s:<10}" + "".join(f"{column[str(size)]:>14.4f}" for column in columns.values()))
    return "\n".join(lines)


def save_heatmap(results: dict, sizes: Sequence[Size], path: str | Path) -> None:
    """A picture of every task's main metric: layers down, dims across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    scores = main_scores(results)
    layers, dims = sorted({s.num_layers for s in sizes}), sorted({s.dim for s in sizes})
    width = max(3.5, 0.7 * len(dims) + 1.5)
    figure, axes = plt.subplots(
        1, len(scores), figsize=(width * len(scores), 0.45 * len(layers) + 1.6), squeeze=False, layout="constrained"
    )
    for axis, (task, values) in zip(axes[0], scores.items(), strict=True):
        grid = np.full((len(layers), len(dims)), np.nan)
        for size in sizes:
            grid[layers.index(size.num_layers), dims.index(size.dim)] = values[str(size)]
        axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if value < middle else "black"
                axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)
        metric = "Spearman" if task in results.get("sts", {}) else "nDCG@10"
        axis.set(title=f"{task}, {metric}", xlabel="dimensions", ylabel="layers")
        axis.set_xticks(range(len(dims)), dims)
        axis.set_yticks(range(len(layers)), layers)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def recipe_flags(path: str) -> list[str]:
    """The flags that a YAML recipe stands for."""
    if not os.path.isfile(path):
        raise ValueError(f"recipe: {path} is not a file")
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe: {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe: {path} must hold `name: value` lines")
    flags = []
    for name, value in recipe.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        else:
            values = value if isinstance(value, list) else [value]
            flags += [str(item).lower() if isinstance(item, bool) else str(item) for item in values]
    return flags
