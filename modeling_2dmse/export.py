"""One size of an elastic model as a small model that needs none of this code: a plain backbone, or ONNX."""

import json
import os
import shutil

import torch

from .export_readme import write_export_readme
from .file_modes import share_weights
from .onnx_export import check_onnxruntime, write_onnx
from .sentence_transformers_files import cut_weight, write_exported_modules, write_onnx_modules
from .tokens import finish_tokenizer

FORMATS = ("transformers", "onnx")
DTYPES = {"transformers": ("float32", "float16", "bfloat16"), "onnx": ("float32", "int8")}


def export(model, path: str, format: str, dtype: str) -> str:
    """Write a truncated model to a folder; if this fails, nothing is left there.

    Args:
        model: a `TwoDMSEModel` that was cut to the size to export; it is converted to `dtype`.
        path: the folder, which must not contain any files yet.
        format: `transformers` (with the files of sentence-transformers) or `onnx`.
        dtype: type of the weights: `float32`, `float16`, `bfloat16`; for onnx `float32` or `int8`, a second file
            (dynamic quantisation).

    Returns:
        `path`.

    Raises:
        ValueError: an argument is not allowed, `format` cannot hold the model's gate, or the ONNX file does not give
            the model's own vectors.
    """
    check_export(path, format, dtype)
    if format == "transformers" and model.is_gated:
        raise ValueError(
            f"format: transformers cannot hold the gate of exit {model.num_layers}, which weighs the tokens of a text; "
            "use onnx, all layers if their exit has no gate, or a model made with --exit_gates false"
        )
    # The folder has this size only, and other clients know one pooling.
    model.config.pooling, model.config.exit_poolings = model.config.pooling_of(model.num_layers), None
    parent = os.path.dirname(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    partial = _new_partial(parent, os.path.basename(os.path.abspath(path)))
    try:
        writer = _write_transformers if format == "transformers" else _write_onnx
        writer(model, partial, dtype)
        finish_tokenizer(partial, model.tokenizer, model.max_length)
        write_export_readme(partial, os.path.basename(os.path.abspath(path)), model, format, dtype)
        if os.path.isdir(path):
            os.rmdir(path)  # empty, as checked
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _new_partial(parent: str, name: str) -> str:
    """A new folder beside the one to write; those of runs that were killed are removed."""
    prefix = f".{name}.partial-"
    for other in os.listdir(parent):
        number = other.removeprefix(prefix)
        if other.startswith(prefix) and number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(os.path.join(parent, other), ignore_errors=True)
    partial = os.path.join(parent, f"{prefix}{os.getpid()}")
    os.mkdir(partial)
    return partial


def _is_running(number: int) -> bool:
    """Whether a process other than this one has the number."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return number != os.getpid()


def check_export(path: str, format: str, dtype: str) -> None:
    """ValueError if the folder contains files, `format` or `dtype` is unknown, or onnxruntime is missing."""
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES[format]:
        raise ValueError(f"dtype: {dtype!r} is not allowed for {format}; choose one of {', '.join(DTYPES[format])}")
    if os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
        raise ValueError(f"output_dir: {path} is not empty; choose another folder")
    if format == "onnx":
        check_onnxruntime()


def _write_transformers(model, folder: str, dtype: str) -> None:
    dense = _dense_weight(model)
    backbone = model.to(getattr(torch, dtype)).backbone
    state = backbone.state_dict()
    if _builds_a_pooler(backbone):
        # AutoModel always builds BERT's pooler, even if nothing uses it; without weights it would be random.
        width = backbone.config.hidden_size
        state["pooler.dense.weight"] = torch.eye(width, dtype=backbone.dtype)
        state["pooler.dense.bias"] = torch.zeros(width, dtype=backbone.dtype)
    backbone.save_pretrained(folder, state_dict=state)
    share_weights(folder)
    model.tokenizer.save_pretrained(folder)
    write_exported_modules(folder, model.config, model.max_length, dense)


def _dense_weight(model) -> torch.Tensor | None:
    """(dim, hidden) matrix from the pooled state to the kept dimensions; None if the state is kept as it is."""
    if model.exit_projections is not None:
        return model.exit_projections[-1].weight[: model.config.dim].detach().float().cpu().contiguous()
    return cut_weight(model.config)


def _builds_a_pooler(backbone) -> bool:
    return hasattr(backbone, "pooler") and backbone.pooler is None


def _write_onnx(model, folder: str, dtype: str) -> None:
    write_onnx(model, os.path.join(folder, "onnx"), dtype)
    config = model.backbone.config
    config.architectures = [type(model.backbone).__name__]
    config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "special_tokens_map.json"), "w", encoding="utf-8") as file:
        json.dump(model.tokenizer.special_tokens_map, file, indent=2)  # older versions of fastembed need it
    write_onnx_modules(folder, model.config, model.max_length)
    with open(os.path.join(folder, "export.json"), "w", encoding="utf-8") as file:
        size = {"num_layers": model.num_layers, "dim": model.config.dim, "max_length": model.max_length, "dtype": dtype}
        json.dump(size, file, indent=2)
