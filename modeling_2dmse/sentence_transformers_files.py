"""The small files with which stock sentence-transformers loads a saved folder."""

import json
import os

from .configuration_2dmse import TwoDMSEConfig

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

    Normalize is left out if embeddings are compared by dot product.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if config.similarity == "cosine":
        modules.append(("2_Normalize", "Normalize"))
    _write_modules(folder, modules, {"kwargs": ["num_layers"]})
    truncated = config.dim if config.dim < config.hidden_size else None
    _write_companions(folder, config, max_length, {"truncate_dim": truncated})


def write_exported_modules(folder: str, config: TwoDMSEConfig, max_length: int | None, dense: bool) -> None:
    """The same for a plain backbone.

    Args:
        dense: whether a Dense module comes before Normalize. It keeps the first dimensions (and applies the exit's
            projection), so that the kept dimensions are the ones that are normalised.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if dense:
        modules.append(("2_Dense", "Dense"))
        settings: dict = {"in_features": config.hidden_size, "out_features": config.dim, "bias": False}
        settings["activation_function"] = "torch.nn.modules.linear.Identity"
        _write_json(os.path.join(folder, "2_Dense", "config.json"), settings)
    if config.similarity == "cosine":
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    _write_modules(folder, modules, {})
    _write_companions(folder, config, max_length, {})


def _write_modules(folder: str, modules: list[tuple[str, str]], transformer_options: dict) -> None:
    entries: list[dict] = []
    for index, (path, name) in enumerate(modules):
        entries.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"})
        os.makedirs(os.path.join(folder, path), exist_ok=True)
    entries[0] |= transformer_options
    _write_json(os.path.join(folder, "modules.json"), entries)


def _write_companions(folder: str, config: TwoDMSEConfig, max_length: int | None, options: dict) -> None:
    pooling: dict = {"word_embedding_dimension": config.hidden_size, "include_prompt": True}
    pooling |= {flag: mode == config.pooling for flag, mode in POOLING_FLAGS.items()}
    settings = {
        "prompts": config.prompts,
        "default_prompt_name": config.default_prompt_name,
        "similarity_fn_name": config.similarity,
    }
    _write_json(os.path.join(folder, "config_sentence_transformers.json"), settings | options)
    transformer = {"max_seq_length": max_length, "do_lower_case": False}
    _write_json(os.path.join(folder, "sentence_bert_config.json"), transformer)
    _write_json(os.path.join(folder, "1_Pooling", "config.json"), pooling)


def _write_json(path: str, content) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
