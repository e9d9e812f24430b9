"""One size of an elastic model as a small model that needs none of this code: a plain backbone, or one ONNX file."""

import json
import os
import shutil

import torch
from safetensors.torch import save_file
from torch import nn

from .encoding import to_embeddings
from .sentence_transformers_files import write_exported_modules
from .tokens import write_truncation

FORMATS = ("transformers", "onnx")
DTYPES = {"transformers": ("float32", "float16", "bfloat16"), "onnx": ("float32", "int8")}


def export(model, path: str, format: str, dtype: str) -> str:
    """Write a truncated model to a folder; if this fails, nothing is left there.

    Args:
        model: a `TwoDMSEModel` that was cut to the size to export; it is converted to `dtype`.
        path: the folder, which must not contain any files yet.
        format: `transformers` (with the files of sentence-transformers) or `onnx`.
        dtype: type of the weights: `float32`, `float16`, `bfloat16`; for onnx `float32` or `int8` (dynamic
            quantisation).

    Returns:
        `path`.

    Raises:
        ValueError: an argument is not allowed, or the ONNX file does not give the model's own vectors.
    """
    check_export(path, format, dtype)
    parent = os.path.dirname(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    partial = _new_partial(parent, os.path.basename(os.path.abspath(path)))
    try:
        writer = _write_transformers if format == "transformers" else _write_onnx
        writer(model, partial, dtype)
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
        _onnxruntime()


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
    model.tokenizer.save_pretrained(folder)
    write_truncation(folder, model.tokenizer, model.max_length)
    write_exported_modules(folder, model.config, model.max_length, dense is not None)
    if dense is not None:
        save_file({"linear.weight": dense}, os.path.join(folder, "2_Dense", "model.safetensors"))


def _dense_weight(model) -> torch.Tensor | None:
    """(dim, hidden) matrix from the pooled state to the kept dimensions; None if the state is kept as it is."""
    config = model.config
    if model.exit_projections is not None:
        return model.exit_projections[-1].weight[: config.dim].detach().float().cpu().contiguous()
    if config.dim < config.hidden_size:
        return torch.eye(config.dim, config.hidden_size)  # the product with this matrix is exactly the slice
    return None


def _builds_a_pooler(backbone) -> bool:
    return hasattr(backbone, "pooler") and backbone.pooler is None


class Embedder(nn.Module):
    """Token ids to embeddings at the model's own size: the module that is exported to ONNX."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """From (batch, length) and (batch, length) to (batch, dim)."""
        layers = (self.model.num_layers,)
        state = self.model(input_ids, attention_mask, layers=layers).layer_embeddings[0]
        return to_embeddings(state, self.model.config.dim, self.model.config.similarity)


def _write_onnx(model, folder: str, dtype: str) -> None:
    training = model.training
    module = Embedder(model.float().cpu()).eval()
    ids = torch.arange(14).reshape(2, 7) + 1
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    target = os.path.join(folder, "model.onnx")
    with torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            module,
            (ids, mask),
            target,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=(axes, axes),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        expected = module(ids, mask).numpy()
    _check_onnx(target, ids.numpy(), mask.numpy(), expected)
    if dtype == "int8":
        _quantize_onnx(target)
    model.train(training)
    model.tokenizer.save_pretrained(folder)
    write_truncation(folder, model.tokenizer, model.max_length)
    with open(os.path.join(folder, "export.json"), "w", encoding="utf-8") as file:
        size = {"num_layers": model.num_layers, "dim": model.config.dim, "max_length": model.max_length, "dtype": dtype}
        json.dump(size, file, indent=2)


def _check_onnx(path: str, ids, mask, expected) -> None:
    session = _onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    difference = abs(got - expected).max() / max(1.0, abs(expected).max())
    if not difference < 1e-4:
        raise ValueError(
            f"format: the ONNX file differs from the model by {difference:.1e}; this backbone cannot be exported"
        )


def _quantize_onnx(path: str) -> None:
    _onnxruntime()
    try:
        from onnxruntime.quantization import quantize_dynamic
    except ImportError as error:
        raise ValueError('dtype: int8 needs onnx; pip install "twodmse[onnx]"') from error
    # Weights of 7 bits, scaled per channel: on CPUs without VNNI, sums of 8-bit products overflow and saturate.
    quantize_dynamic(path, f"{path}.int8", per_channel=True, reduce_range=True)
    os.replace(f"{path}.int8", path)


def _onnxruntime():
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'format: onnx needs {error.name}; pip install "twodmse[onnx]"') from error
    return onnxruntime
