"""Write one size as a small model: `python run_scripts/export.py --model_name_or_path M --num_layers 2 --dim 64
--output_dir SMALL`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, remote_code
from run_scripts.shared.model_folder import read_shape

if TYPE_CHECKING:
    import numpy as np

    from trainer.evaluation import StsData


@dataclass
class ExportArguments:
    """What is written where."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a TwoDMSE model or any text encoder."})
    output_dir: str = field(metadata={"help": "Folder to write; it must not hold files yet."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers to keep. Default: all."})
    dim: int | None = field(default=None, metadata={"help": "Dimensions to keep. Default: all."})
    format: str = field(
        default="transformers",
        metadata={"help": "transformers (a plain backbone) or onnx, both with the files of sentence-transformers."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "float32, float16 or bfloat16 weights; for onnx float32 or int8 (a second, quantised file)."},
    )
    sts_files: list[str] | None = field(
        default=None,
        metadata={"help": "Scored pairs; prints the Spearman of what was written and of the model itself."},
    )
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, check, write, report."""
    with cli.user_errors():
        (args,) = cli.Parser((ExportArguments,)).parse(argv)
        check(args)

        from modeling_2dmse.export import check_export
        from run_scripts.shared import models
        from trainer.evaluation import load_sts, name_apart

        check_export(args.output_dir, args.format, args.dtype)
        tasks = name_apart([load_sts(path) for path in args.sts_files or []], args.sts_files or [])
        model = models.load_encoder(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        small = model.truncate(args.num_layers, args.dim)
        small.export(args.output_dir, format=args.format, dtype=args.dtype)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    size = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    print(f"{small.num_layers}x{small.config.dim} as {args.format}, {args.dtype}: {args.output_dir}")
    print(f"{parameters / 1e6:.2f} M of {whole / 1e6:.2f} M parameters, {size / 1e6:.1f} MB on disk")
    for path in sorted(Path(args.output_dir).rglob("*.onnx")):
        print(f"{path.relative_to(args.output_dir)}: {path.stat().st_size / 1e6:.1f} MB")
    trusted = args.trust_remote_code
    encoder = onnx_encoder if args.format == "onnx" else plain_encoder
    written = encoder(args.output_dir, trust_remote_code=trusted) if tasks else None
    rows = []
    encode = partial(small.encode, prompt="")  # as the files that are compared, and as evaluations
    for task in tasks:
        before, after = spearman(task, encode), spearman(task, written)
        print(f"{task.name}: Spearman {after:.4f}, in the model {before:.4f} ({after - before:+.4f})")
        rows.append(f"| {task.name} | {after:.4f} | {before:.4f} |")
    if rows:
        with cli.writing(args.output_dir):
            add_scores(args.output_dir, rows)


def check(args: ExportArguments) -> None:
    """ValueError for a flag that is not allowed."""
    checks.check_choice("format", args.format, tuple(checks.EXPORT_DTYPES))
    dtypes = checks.EXPORT_DTYPES[args.format]
    if args.dtype not in dtypes:
        raise ValueError(f"dtype: {args.dtype!r} is not allowed for {args.format}; choose one of {', '.join(dtypes)}")
    if os.path.isfile(args.output_dir) or (os.path.isdir(args.output_dir) and os.listdir(args.output_dir)):
        raise ValueError(f"output_dir: {args.output_dir} is not empty; choose another folder")
    for name, highest in zip(("num_layers", "dim"), read_shape(args.model_name_or_path), strict=True):
        value = getattr(args, name)
        if value is not None and (value < 1 or value > (highest or value)):
            known = f"this model has 1 to {highest}" if highest else "use a whole number from 1"
            raise ValueError(f"{name}: {value} is not allowed; {known}")
    checks.check_files("sts_files", *(args.sts_files or []))
    checks.check_model(args.model_name_or_path)


def add_scores(folder: str, rows: Sequence[str]) -> None:
    """Add the measured scores to the README.md of an export."""
    table = ["| Spearman | this folder | the model it was cut out of |", "|---|---:|---:|", *rows]
    with open(os.path.join(folder, "README.md"), "a", encoding="utf-8") as file:
        file.write("\n## Scores\n\n" + "\n".join(table) + "\n")


def plain_encoder(
    folder: str, batch_size: int = 32, trust_remote_code: bool = False
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to the embeddings that the files of a written folder give, read without this project's
    models: backbone, pooling, and the Dense module that keeps the first dimensions."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    from modeling_2dmse.pooling import pool
    from modeling_2dmse.sentence_transformers_import import read_folder

    backbone = AutoModel.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    pooling, path = str(read_folder(folder).pooling), Path(folder, "2_Dense", "model.safetensors")
    dense = load_file(path)["linear.weight"].float() if path.is_file() else None
    with open(os.path.join(folder, "sentence_bert_config.json"), encoding="utf-8") as file:
        longest = json.load(file)["max_seq_length"]
    with open(os.path.join(folder, "modules.json"), encoding="utf-8") as file:
        normalizes = any(module["type"].endswith("Normalize") for module in json.load(file))

    def encode(texts: Sequence[str]) -> np.ndarray:
        outputs = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            with torch.inference_mode():
                vectors = pool(backbone(**batch).last_hidden_state, batch["attention_mask"], pooling)
            vectors = vectors if dense is None else vectors @ dense.T
            outputs.append(torch.nn.functional.normalize(vectors, dim=-1) if normalizes else vectors)
        return torch.cat(outputs).numpy()

    return encode


def onnx_encoder(
    folder: str, batch_size: int = 32, trust_remote_code: bool = False
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts to the embeddings that stock onnxruntime and the saved tokenizer give, from the quantised
    file if there is one."""
    import numpy as np
    import onnxruntime
    from transformers import AutoTokenizer

    files = [Path(folder, "onnx", name) for name in ("model_quantized.onnx", "model.onnx")]
    path = next(file for file in files if file.is_file())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)

    def encode(texts: Sequence[str]) -> np.ndarray:
        outputs = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = tokenizer(part, padding=True, truncation=True, return_tensors="np")
            outputs.append(session.run(["sentence_embedding"], dict(batch))[0])
        return np.concatenate(outputs)

    return encode


def spearman(task: StsData, encode: Callable[[Sequence[str]], np.ndarray]) -> float:
    """Spearman of the similarity of the pairs, from embeddings that are of unit norm if cosines are compared."""
    import numpy as np
    import torch

    from trainer.evaluation import correlations

    left, right = (torch.from_numpy(encode(list(side))).double() for side in (task.sentence1, task.sentence2))
    similarity = (left * right).sum(dim=1)
    return correlations(similarity.numpy(), np.asarray(task.score, dtype=np.float64))["spearman"]


if __name__ == "__main__":
    main()
