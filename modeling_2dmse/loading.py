"""What `from_pretrained` needs besides transformers: checks of the weights, and arguments for the other files."""

import difflib
import os
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from .backbone import check_device_map, check_one_stack, drop_pooler


def load_backbone(name_or_path: str, **kwargs) -> PreTrainedModel:
    """A backbone without its pooling head.

    Args:
        name_or_path: folder or Hub name.
        kwargs: those of `AutoModel.from_pretrained`.

    Raises:
        ValueError: transformers has no such model, it has an encoder and a decoder, some of its layers have no weights,
            or weights are not finite, no floating-point numbers or on the meta device.
    """
    try:
        backbone, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except ValueError as error:
        check_known(name_or_path, error, **hub_kwargs(kwargs))
        raise
    check_one_stack(backbone)
    check_device_map(backbone, name_or_path)
    backbone = drop_pooler(backbone)
    used = dict(backbone.named_parameters())
    _check_filled(sorted(set(info["missing_keys"]) & used.keys()), name_or_path, "download or save the model again")
    check_weights(backbone, name_or_path)
    return backbone


def check_type(name: str | os.PathLike, kwargs: dict) -> None:
    """ValueError if a folder or repository has an SMAE pre-training model; `kwargs` are those of `from_pretrained`."""
    if kwargs.get("config") is not None:
        return
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name, **hub_kwargs(kwargs))
    except OSError:  # a folder of adapters, or what `from_pretrained` itself will miss
        return
    if stored.get("model_type") == "starbucks-smae":
        raise ValueError(
            f"{name}: it is an SMAE pre-training model; AutoModel.from_pretrained loads its encoder, and "
            "StarbucksForMaskedAutoencoding.from_pretrained the whole"
        )


def check_known(name_or_path: str, error: ValueError, **kwargs) -> None:
    """ValueError from `error` in one sentence, if the cause is a model type that AutoModel does not load: transformers
    lists all that it does."""
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in MODEL_MAPPING_NAMES or "auto_map" in config:
        return
    if kind in CONFIG_MAPPING and kind not in CONFIG_MAPPING_NAMES:  # a class that was registered
        return
    near = difflib.get_close_matches(kind, MODEL_MAPPING_NAMES, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else "name a text encoder, or update transformers"
    raise ValueError(
        f"name_or_path: {name_or_path} is of the model type {kind!r}, which transformers {__version__} cannot load as "
        f"an encoder; {hint}"
    ) from error


def check_stored(name: object, quantized: bool) -> None:
    """ValueError if the weights in a local folder are whole numbers, which transformers would take for their values."""
    folder = Path(str(name))
    for path in sorted(folder.glob("model*.safetensors")) if folder.is_dir() and not quantized else ():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dictionary
                kind = file.get_slice(key).get_dtype()
                if key.endswith((".weight", ".bias")) and not kind.startswith(("F", "BF")):
                    raise ValueError(f"{name}: the weights of {key} are {kind}, not floating-point numbers")


def check_loaded(model: nn.Module, info: dict, name: object, hint: str) -> None:
    """ValueError if `from_pretrained` left tensors without weights, which would be random, or weights without a use.

    Args:
        model: the model.
        info: the loading info of transformers' `from_pretrained`.
        name: the folder or repository, for the message.
        hint: what to do instead, for the message.
    """
    _check_filled(sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]), name, hint)
    unused = sorted(info["unexpected_keys"])
    if unused:
        raise ValueError(
            f"{name}: config.json has no place for {len(unused)} of the tensors in the weights, for example "
            f"{unused[0]}; it is not the configuration that they were saved with"
        )
    check_weights(model, name)


def check_weights(model: nn.Module, name: object) -> None:
    """ValueError that names a parameter or saved buffer that is not finite, or a parameter of other numbers than
    floating-point ones; `name` is the model."""
    quantized = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    check_stored(name, quantized)
    for key, parameter in model.named_parameters():
        if parameter.is_meta or quantized:
            continue
        if not parameter.is_floating_point():
            raise ValueError(f"{name}: the weights of {key} are {parameter.dtype}, not floating-point numbers")
        if not parameter.isfinite().all():
            raise ValueError(f"{name}: the weights of {key} are not finite; every embedding would be wrong")
    saved = model.state_dict().keys()  # buffers that are not saved may have infinities, masks for example
    for key, buffer in model.named_buffers():
        if key in saved and not buffer.is_meta and buffer.is_floating_point() and not buffer.isfinite().all():
            raise ValueError(f"{name}: the values of {key} are not finite; every embedding would be wrong")


def _check_filled(absent: list[str], name: object, hint: str) -> None:
    if absent:
        raise ValueError(
            f"{name}: the weights lack {len(absent)} of the tensors that config.json asks for, for example "
            f"{absent[0]}; they would be random ({hint})"
        )


def auto_kwargs(kwargs: dict) -> dict:
    """The arguments of `from_pretrained` that hold for transformers' Auto classes too, which load the other files.

    `trust_remote_code` is always among them, False unless the caller has given it: without it, an Auto class that finds
    code in a folder asks on standard input whether to run it.
    """
    return {**hub_kwargs(kwargs), "trust_remote_code": bool(kwargs.get("trust_remote_code"))}


def tokenizer_kwargs(name_or_path: str | os.PathLike, kwargs: dict) -> dict:
    """The arguments with which a model's tokenizer is read later, from those of the model's `from_pretrained`.

    A local folder gets its absolute path, so that it is found after a change of the working directory.
    """
    place = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else str(name_or_path)
    return {"pretrained_model_name_or_path": place, **auto_kwargs(kwargs)}


def hub_kwargs(kwargs: dict) -> dict:
    """The arguments of `from_pretrained` that the tokenizer and the pooling must be fetched with as well."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}
