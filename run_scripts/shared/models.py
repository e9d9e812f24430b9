"""Finding and loading the model that a flag names."""

import dataclasses
import json
import os
import zlib

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, dynamic_module_utils

from modeling_2dmse import StarbucksConfig, TwoDMSEConfig, TwoDMSEModel
from modeling_2dmse.batching import check_words
from modeling_2dmse.loading import check_known
from run_scripts.shared import checks, output, remote_code
from run_scripts.shared.quickstart import MODEL_NAME, minilm_path

# Every load says whether code of the model may be run. If transformers meets some in a load of its own that does not,
# this makes it refuse: it would ask on standard input, which may be the texts to embed.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


# Fields of a configuration that do not change embeddings, or differ between two ways to load the same model. Prompts
# belong to the texts.
_SAME_EMBEDDINGS = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "sizes", "is_matryoshka"),
    *("matryoshka_dimensions", "prompts", "default_prompt_name"),
)


def resolve_model(name_or_path: str) -> str:
    """The folder or Hub name of a model; ValueError for a path that is not the folder of a model."""
    if name_or_path == MODEL_NAME:
        name_or_path = minilm_path()
    checks.check_model(name_or_path)
    return name_or_path


def load_encoder(
    name_or_path: str, sizes=None, pooling: str | None = None, argument: str = "model_name_or_path", **kwargs
) -> TwoDMSEModel:
    """Load a TwoDMSE model, or any other text encoder as the backbone of a new elastic model, and its tokenizer.

    Args:
        name_or_path: folder or Hub name.
        sizes, pooling: of a new elastic model; an elastic model has its own.
        argument: the name that errors give to the model.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: the model cannot be loaded.
    """
    with remote_code.named(name_or_path, argument):
        name_or_path = resolve_model(name_or_path)
        model = _load_encoder(name_or_path, sizes, pooling, **kwargs)
        _try(model)
    return model


def _try(model: TwoDMSEModel) -> None:
    """Load the tokenizer and encode a text: what does not work in a folder shows here, where an error is one line."""
    rows = model.get_input_embeddings().num_embeddings
    check_words(max(model.tokenizer.get_vocab().values(), default=0), rows)
    if not np.isfinite(model.encode("a text", prompt="")).all():
        raise ValueError("its embeddings are not finite")


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


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights."""
    name_or_path = resolve_model(name_or_path)
    with remote_code.named(name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def read_config(name_or_path: str, **kwargs) -> PreTrainedConfig:
    """The configuration of a model; ValueError if it cannot be found."""
    hub = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    trusted = bool(kwargs.get("trust_remote_code"))
    with remote_code.named(name_or_path):
        try:
            return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trusted, **hub)
        except OSError as error:
            reason = " ".join(str(error).split())
            state = "is not a folder, and the Hub does not have it"
            if os.path.isdir(name_or_path):
                state = "has a damaged config.json"
            raise ValueError(f"model_name_or_path: {name_or_path} {state}: {reason[:200]}") from error
        except ValueError as error:
            # A value in the file: no flag is wrong, even if the message starts with its name.
            if "trust_remote_code" in str(error):
                raise
            check_known(name_or_path, error, **hub)
            raise ValueError(
                f"model_name_or_path: {name_or_path}/config.json: {' '.join(str(error).split())}"
            ) from error


def fingerprint(model: TwoDMSEModel) -> int:
    """A checksum of the weights, which any further training changes."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return value


def describe(model: TwoDMSEModel) -> dict:
    """What makes the embeddings of a model besides its size: if one of these changes, others come out."""
    config, tokenizer = model.config, model.tokenizer
    settings = config.to_dict()
    for part in (settings, settings["backbone_config"]):
        for name in _SAME_EMBEDDINGS:
            part.pop(name, None)
    written = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "weights": fingerprint(model),
        "pooling": config.pooling,
        "config": zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode("utf-8")),
        "tokenizer": zlib.crc32(written.encode("utf-8")),
    }


def check_max_length(model: TwoDMSEModel, max_length: int | None, argument: str = "max_length") -> None:
    """ValueError if a model cannot read texts of so many tokens; None is a flag that was not given."""
    if max_length is not None and max_length > model.max_length:
        raise ValueError(f"{argument}: {max_length} is not allowed; this model reads 1 to {model.max_length} tokens")


def check_training_length(args, longest: int, default: int | None = None) -> None:
    """ValueError if a length of arguments is more tokens than a model reads; the default one is cut, which is said.

    Args:
        args: a dataclass with `max_length` and perhaps `max_query_length`.
        longest: the tokens that the model reads.
        default: the `max_length` that nobody has chosen, if it is not the field's default.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name) if field.name in ("max_length", "max_query_length") else None
        if value is None or value <= longest:
            continue
        if value != (default or field.default):
            raise ValueError(f"{field.name}: {value} is not allowed; this model reads up to {longest} tokens")
        output.say(f"{field.name}: {value} is cut to the {longest} tokens that this model reads")
        setattr(args, field.name, longest)


def to_device(model: TwoDMSEModel) -> TwoDMSEModel:
    """The model on the GPU, if there is one: for scripts without a Trainer, which would place it."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def load_adapter(folder: str, **kwargs) -> TwoDMSEModel:
    """The model of a LoRA checkpoint, with the adapter merged into the weights."""
    from peft import PeftConfig, PeftModel

    config = TwoDMSEConfig.from_pretrained(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    encoder = load_encoder(base, config.sizes, **kwargs)
    encoder.config.pooling, encoder.config.similarity = config.pooling, config.similarity
    encoder.config.prompts, encoder.config.default_prompt_name = config.prompts, config.default_prompt_name
    if encoder.num_layers > config.num_layers:
        encoder = encoder.truncate(config.num_layers, config.dim)
    if config.exit_projections:
        encoder.add_exit_projections()
    if config.exit_gates:
        encoder.add_exit_gates()
    encoder.config.exit_poolings = config.exit_poolings
    merged = PeftModel.from_pretrained(encoder, folder).merge_and_unload()
    merged.config.set_ladder(config.sizes)
    return merged.eval()
