"""Write one size as a small model of its own: `python run_scripts/export.py --model_name_or_path M --num_layers 2
--dim 64 --output_dir SMALL`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from modeling_2dmse import TwoDMSEModel
from modeling_2dmse.export import check_export
from run_scripts.shared import cli, models
from trainer.evaluation import StsData, correlations, load_sts


@dataclass
class ExportArguments:
    """What is written where."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    output_dir: str = field(metadata={"help": "Folder to write; it must not hold files yet."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers to keep. Default: all."})
    dim: int | None = field(default=None, metadata={"help": "Dimensions to keep. Default: all."})
    format: str = field(
        default="transformers",
        metadata={"help": "transformers (a plain backbone, with the files of sentence-transformers) or onnx."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "float32, float16 or bfloat16 weights; for onnx float32 or int8 (dynamic quantisation)."},
    )
    sts_files: list[str] | None = field(
        default=None, metadata={"help": "Scored pairs; Spearman of what was written is printed beside the model's own."}
    )


def main(argv=None) -> None:
    """Parse, check, write, report."""
    with cli.user_errors():
        (args,) = cli.Parser((ExportArguments,)).parse(argv)
        check_export(args.output_dir, args.format, args.dtype)
        tasks = [load_sts(path) for path in args.sts_files or []]
        model = models.load_encoder(args.model_name_or_path)
        small = model.truncate(args.num_layers, args.dim)
        small.export(args.output_dir, format=args.format, dtype=args.dtype)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    size = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    print(f"{small.num_layers}x{small.config.dim} as {args.format}, {args.dtype}: {args.output_dir}")
    print(f"{parameters / 1e6:.2f} M of {whole / 1e6:.2f} M parameters, {size / 1e6:.1f} MB on disk")
    written = onnx_encoder(args.output_dir) if args.format == "onnx" else plain_encoder(args.output_dir, small)
    for task in tasks:
        before, after = spearman(task, small.encode), spearman(task, written)
        print(f"{task.name}: Spearman {after:.4f}, in the model {before:.4f} ({after - before:+.4f})")


def plain_encoder(folder: str, small: TwoDMSEModel) -> Callable[[Sequence[str]], np.ndarray]:
    """What the written backbone gives, loaded anew."""
    model = TwoDMSEModel.from_backbone(folder, pooling=small.config.pooling)
    return lambda texts: model.encode(texts, dim=small.config.dim)


def onnx_encoder(folder: str, batch_size: int = 32) -> Callable[[Sequence[str]], np.ndarray]:
    """What stock onnxruntime and the saved tokenizer give."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [entry.name for entry in session.get_inputs()]

    def encode(texts: Sequence[str]) -> np.ndarray:
        outputs = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="np"
            )
            outputs.append(session.run(None, {name: batch[name] for name in names})[0])
        return np.concatenate(outputs)

    return encode


def spearman(task: StsData, encode: Callable[[Sequence[str]], np.ndarray]) -> float:
    """Spearman of the cosine similarity of the pairs."""
    left, right = (torch.from_numpy(encode(list(side))).double() for side in (task.sentence1, task.sentence2))
    cosine = torch.nn.functional.cosine_similarity(left, right)
    return correlations(cosine.numpy(), np.asarray(task.score, dtype=np.float64))["spearman"]


if __name__ == "__main__":
    main()
