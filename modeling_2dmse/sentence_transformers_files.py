"""The small files with which stock sentence-transformers loads a saved folder."""

import json
import os

import torch
from safetensors.torch import save_file

from .configuration_2dmse import TwoDMSEConfig
from .file_modes import share_weights

# The order is that in which sentence-transformers concatenates the vectors of several modes.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def write_sentence_transformers_files(folder: str, config: TwoDMSEConfig, max_length: int | None) -> None:
    """Write modules.json and the files that belong to it: Transformer (`num_layers` per call), Pooling, Normalize.

    The model weighs its token states, if it has gates, and cuts them to `config.dim`, so that vectors are cut before
    they are normalised. Normalize is left out if embeddings are compared by dot product.
    """
    _write_modules(folder, config, None, {"kwargs": ["num_layers"]})
    _write_companions(folder, config, max_length, config.dim)


def write_exported_modules(
    folder: str, config: TwoDMSEConfig, max_length: int | None, dense: torch.Tensor | None
) -> None:
    """The same for a plain backbone; a Dense module cuts the vectors, and projects them, before they are normalised.

    Args:
        folder: where the files go.
        config: the configuration of the model that is exported.
        max_length: longest input in tokens.
        dense: (dim, hidden), from the pooled state to the embedding before it is normalised; None for the state itself.
    """
    _write_modules(folder, config, dense, {})
    _write_companions(folder, config, max_length, config.hidden_size)


def write_onnx_modules(folder: str, config: TwoDMSEConfig, max_length: int | None) -> None:
    """The same for an ONNX file whose token states are weighed, projected and cut already."""
    _write_modules(folder, config, None, {})
    _write_companions(folder, config, max_length, config.dim)


def cut_weight(config: TwoDMSEConfig) -> torch.Tensor | None:
    """(dim, hidden) matrix whose product with a vector is exactly its first `dim` values; None if all are kept."""
    return torch.eye(config.dim, config.hidden_size) if config.dim < config.hidden_size else None


def _write_modules(folder: str, config: TwoDMSEConfig, dense: torch.Tensor | None, transformer_options: dict) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if dense is not None:
        modules.append(("2_Dense", "Dense"))
        settings: dict = {"in_features": dense.shape[1], "out_features": dense.shape[0], "bias": False}
        settings["activation_function"] = "torch.nn.modules.linear.Identity"
        _write_json(os.path.join(folder, "2_Dense", "config.json"), settings)
        save_file({"linear.weight": dense}, os.path.join(folder, "2_Dense", "model.safetensors"))
        share_weights(os.path.join(folder, "2_Dense"))
    if config.similarity == "cosine":
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    entries: list[dict] = []
    for index, (path, name) in enumerate(modules):
        entries.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"})
        os.makedirs(os.path.join(folder, path), exist_ok=True)
    entries[0] |= transformer_options
    _write_json(os.path.join(folder, "modules.json"), entries)


def _write_companions(folder: str, config: TwoDMSEConfig, max_length: int | None, width: int) -> None:
    pooling: dict = {"word_embedding_dimension": width, "include_prompt": True}
    pooling |= {flag: mode == config.pooling for flag, mode in POOLING_FLAGS.items()}
    settings = {
        "prompts": config.prompts,
        "default_prompt_name": config.default_prompt_name,
        "similarity_fn_name": config.similarity,
    }
    _write_json(os.path.join(folder, "config_sentence_transformers.json"), settings)
    transformer = {"max_seq_length": max_length, "do_lower_case": False}
    _write_json(os.path.join(folder, "sentence_bert_config.json"), transformer)
    _write_json(os.path.join(folder, "1_Pooling", "config.json"), pooling)


def _write_json(path: str, content) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
