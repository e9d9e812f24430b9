"""Finding and loading the model that a flag names."""

import contextlib
import os
import zlib

import torch
from transformers import AutoConfig, PreTrainedConfig, dynamic_module_utils

from modeling_2dmse import StarbucksConfig, TwoDMSEConfig, TwoDMSEModel
from run_scripts.shared import checks, remote_code
from run_scripts.shared.quickstart import MODEL_NAME, minilm_path

# Every load says whether code of the model may be run. If transformers meets some in a load of its own that does not,
# this makes it refuse: it would ask on standard input, which may be the texts to embed.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def resolve_model(name_or_path: str) -> str:
    """The folder or Hub name of a model; ValueError for a path that is not the folder of a model."""
    if name_or_path == MODEL_NAME:
        name_or_path = minilm_path()
    checks.check_model(name_or_path)
    return name_or_path


def load_encoder(name_or_path: str, sizes=None, pooling: str | None = None, **kwargs) -> TwoDMSEModel:
    """Load a TwoDMSE model, or any other text encoder as the backbone of a new elastic model, and its tokenizer."""
    name_or_path = resolve_model(name_or_path)
    with remote_code.named(name_or_path):
        model = _load_encoder(name_or_path, sizes, pooling, **kwargs)
        with contextlib.suppress(OSError):  # a folder without a tokenizer is refused when it is needed
            model.tokenizer  # noqa: B018, loaded now, where an error is one line
    return model


def _load_encoder(name_or_path: str, sizes, pooling: str | None, **kwargs) -> TwoDMSEModel:
    if os.path.isfile(os.path.join(name_or_path, "adapter_config.json")):
        return load_adapter(name_or_path, **kwargs)
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        # Old folders of sentence-transformers have their encoder in a folder of its own.
        return TwoDMSEModel.from_backbone(name_or_path, sizes=sizes, pooling=pooling, **kwargs)
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
    """The configuration of a model; ValueError if it cannot be found."""
    hub = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    trusted = bool(kwargs.get("trust_remote_code"))
    try:
        with remote_code.named(name_or_path):
            return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trusted, **hub)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model_name_or_path: {name_or_path} is not a folder, and the Hub does not have it: {reason}"
        ) from error


def fingerprint(model: TwoDMSEModel) -> int:
    """A checksum of the weights, which any further training changes."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return value


def to_device(model: TwoDMSEModel) -> TwoDMSEModel:
    """The model on the GPU, if there is one: for scripts without a Trainer, which would place it."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def load_adapter(folder: str, **kwargs) -> TwoDMSEModel:
    """The model of a LoRA checkpoint, with the adapter merged into the weights."""
    from peft import PeftConfig, PeftModel

    config = TwoDMSEConfig.from_pretrained(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    encoder = load_encoder(base, config.sizes, **kwargs)
    encoder.config.pooling = config.pooling
    if encoder.num_layers > config.num_layers:
        encoder = encoder.truncate(config.num_layers, config.dim)
    if config.exit_projections:
        encoder.add_exit_projections()
    merged = PeftModel.from_pretrained(encoder, folder).merge_and_unload()
    merged.config.set_ladder(config.sizes)
    return merged.eval()
