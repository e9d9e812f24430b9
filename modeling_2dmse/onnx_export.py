"""One size as an ONNX file: token ids to token states and embeddings."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from .encoding import to_embeddings
from .pooling import pool

OUTPUTS = ("last_hidden_state", "sentence_embedding")
# How lines of torch's exporter and of onnxruntime's quantisation start that have no meaning for a text encoder, by
# their logger, and a warning of torch about torch's own code.
_LINES = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed. Skipping",
    "root": "Please consider to run pre-processing before quantization",
}
_WARNING = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


class Embedder(nn.Module):
    """Token ids to token states and embeddings at the model's own size: the module that is exported to ONNX.

    Projection and cut are linear, as all poolings are, and a gate gives each token a factor. Applied to each token,
    they give the same embeddings, and what pools and normalises the token states gets them too.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From three (batch, length) tensors to (batch, length, dim) token states and (batch, dim) embeddings."""
        config = self.model.config
        states = self.model(input_ids, attention_mask, token_type_ids).last_hidden_state.float()
        return states, to_embeddings(pool(states, attention_mask, config.pooling), config.dim, config.similarity)


def write_onnx(model, folder: str, dtype: str) -> None:
    """Write `model.onnx` and, for `int8`, `model_quantized.onnx`: the names that transformers.js and optimum look for.

    The inputs are those that the tokenizer gives, each (batch_size, sequence_length). The outputs are
    `last_hidden_state` of (batch_size, sequence_length, dim), weighed, projected and cut, and `sentence_embedding` of
    (batch_size, dim), pooled and normalised.

    Args:
        model: a `TwoDMSEModel` that was cut to the size to export; it is converted to float32 and moved to the CPU.
        folder: where the files go.
        dtype: `float32` or `int8`.

    Raises:
        ValueError: the file does not give the model's own vectors.
    """
    os.makedirs(folder)
    training = model.training
    module = Embedder(model.float().cpu()).eval()
    ids = torch.arange(14).reshape(2, 7) + 1
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in model.tokenizer.model_input_names:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    # The axes of all inputs are the same two; torch warns about names that are given twice.
    named, free = {0: "batch_size", 1: "sequence_length"}, dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    path = os.path.join(folder, "model.onnx")
    with _known_lines_hidden(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            module,
            kwargs=inputs,
            f=path,
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            dynamic_shapes={name: named if name == "input_ids" else free for name in inputs},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        expected = module(**inputs)
    _check(path, inputs, expected)
    if dtype == "int8":
        _quantize(path, os.path.join(folder, "model_quantized.onnx"))
    model.train(training)


def _check(path: str, inputs: dict[str, torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    session = check_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(list(OUTPUTS), {name: value.numpy() for name, value in inputs.items()})
    for got, tensor in zip(outputs, expected, strict=True):
        wanted = tensor.numpy()
        difference = abs(got - wanted).max() / max(1.0, abs(wanted).max())
        if not difference < 1e-4:
            raise ValueError(
                f"format: the ONNX file differs from the model by {difference:.1e}; this backbone cannot be exported"
            )


def _quantize(path: str, target: str) -> None:
    try:
        from onnxruntime.quantization import quantize_dynamic
    except ImportError as error:
        raise ValueError('dtype: int8 needs onnx; pip install "twodmse[onnx]"') from error
    # Weights of 7 bits, scaled per channel: on CPUs without VNNI, sums of 8-bit products overflow and saturate.
    with _known_lines_hidden():
        quantize_dynamic(path, target, per_channel=True, reduce_range=True)


@contextlib.contextmanager
def _known_lines_hidden() -> Iterator[None]:
    """Hide `_LINES` and `_WARNING`, about which a user can do nothing."""
    loggers = [logging.getLogger(name) for name in _LINES]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_WARNING, category=FutureWarning)
        for logger in loggers:
            logger.addFilter(_is_shown)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(tuple(_LINES.values()))


def check_onnxruntime():
    """The module onnxruntime; ValueError if it, or another package that the export needs, is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'format: onnx needs {error.name}; pip install "twodmse[onnx]"') from error
    return onnxruntime
