"""Finding and loading the model that a flag names."""

import os
import zlib

import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_2dmse import StarbucksConfig, TwoDMSEConfig, TwoDMSEModel

from .quickstart import MODEL_NAME, minilm_path


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
