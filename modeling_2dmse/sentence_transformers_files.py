"""The small files that let stock sentence-transformers load a saved folder, and how to read its pooling back."""

import json
import os

from transformers.utils import cached_file

_MODULES = [
    {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "sentence_transformers.models.Transformer",
        "kwargs": ["num_layers"],
    },
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_sentence_transformers_files(folder: str, config, max_length: int | None) -> None:
    """Write modules.json and its companions: Transformer (num_layers per call), Pooling, Normalize."""
    truncated = config.dim if config.dim < config.hidden_size else None
    pooling = {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_cls_token": config.pooling == "cls",
        "pooling_mode_mean_tokens": config.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": config.pooling == "weightedmean",
        "pooling_mode_lasttoken": config.pooling == "lasttoken",
        "include_prompt": True,
    }
    settings = {
        "prompts": config.prompts,
        "default_prompt_name": config.default_prompt_name,
        "similarity_fn_name": "cosine",
        "truncate_dim": truncated,
    }
    _write_json(os.path.join(folder, "modules.json"), _MODULES)
    _write_json(os.path.join(folder, "config_sentence_transformers.json"), settings)
    _write_json(
        os.path.join(folder, "sentence_bert_config.json"), {"max_seq_length": max_length, "do_lower_case": False}
    )
    _write_json(os.path.join(folder, "1_Pooling", "config.json"), pooling)
    os.makedirs(os.path.join(folder, "2_Normalize"), exist_ok=True)


def read_pooling(name_or_path: str, **hub_kwargs) -> str | None:
    """The pooling that a sentence-transformers folder or repository declares, None where it declares none."""
    path = cached_file(
        name_or_path,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    flags = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    modes = [mode for flag, mode in flags.items() if config.get(flag)]
    return config.get("pooling_mode", modes[0] if len(modes) == 1 else None)


def _write_json(path: str, content) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
