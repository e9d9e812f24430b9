"""Reading a sentence-transformers folder: what it declares besides its encoder is taken over, or refused by name."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath

import torch
from safetensors.torch import load_file
from transformers.utils import cached_file, logging

from .configuration_2dmse import POOLING_MODES, TwoDMSEConfig
from .sentence_transformers_files import POOLING_FLAGS

logger = logging.get_logger(__name__)

# The names that sentence-transformers has given to the settings of its Transformer module.
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_KEYWORDS = {
    "model": ("model_args", "model_kwargs", "config_args", "config_kwargs"),
    "tokenizer": ("tokenizer_args", "processor_kwargs"),
}
# Arguments of `from_pretrained` that a folder must not choose for its reader.
_CALLERS_OWN = ("trust_remote_code", "code_revision", "cache_dir", "local_files_only", "revision", "subfolder", "token")
# Similarities that put vectors of unit length in the same order as cosine.
_LIKE_COSINE = ("dot", "euclidean")
_IDENTITY = ("torch.nn.modules.linear.Identity", "torch.nn.Identity")


@dataclass
class Imported:
    """What a folder declares besides its encoder.

    Args:
        pooling: as in `TwoDMSEConfig`; None if the folder declares none.
        subfolder: where the encoder is, `""` for the folder itself.
        model_kwargs: arguments for `AutoModel.from_pretrained`.
        tokenizer_kwargs: arguments for `AutoTokenizer.from_pretrained`, with `model_max_length`.
        lower_case: whether texts are lower-cased first.
        dense: (dim, hidden), the product of the Dense modules; None if there are none.
        dim: dimensions that vectors are cut to; None for all.
        prompts: texts to put in front, by name.
        default_prompt_name: the prompt that is used if none is named.
    """

    pooling: str | None = None
    subfolder: str = ""
    model_kwargs: dict = field(default_factory=dict)
    tokenizer_kwargs: dict = field(default_factory=dict)
    lower_case: bool = False
    dense: torch.Tensor | None = None
    dim: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


class _Folder:
    """The files of a folder or repository."""

    def __init__(self, name_or_path: str, hub_kwargs: dict):
        self.name, self._hub_kwargs = name_or_path, hub_kwargs

    def path(self, file: str) -> str | None:
        """Where a file is on this machine; None if there is none."""
        return cached_file(
            self.name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **self._hub_kwargs,
        )

    def json(self, *files: str, kind: type = dict):
        """The content, of type `kind`, of the first of the files that exists; None if none does."""
        file, path = next(((file, path) for file in files if (path := self.path(file))), (None, None))
        if path is None:
            return None
        try:
            with open(path, encoding="utf-8") as opened:
                content = json.load(opened)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"name_or_path: {self.name} has a broken {os.path.basename(path)}: {error}") from error
        if not isinstance(content, kind):
            wanted = "object" if kind is dict else "list"
            raise self.refuse(f"a {file} that is not a JSON {wanted}", "as sentence-transformers writes")
        return content

    def refuse(self, what: str, rest: str = "which an elastic model cannot take over") -> ValueError:
        return ValueError(f"name_or_path: {self.name} has {what}, {rest}")


def read_folder(name_or_path: str, pooling: str | None = None, **hub_kwargs) -> Imported:
    """What a sentence-transformers folder or repository declares besides its encoder.

    Args:
        name_or_path: the folder or Hub name; without a modules.json, only `1_Pooling/config.json` is read.
        pooling: if given, it replaces the folder's, and modules that cannot be taken over are left out with a warning.
        hub_kwargs: those of `loading.hub_kwargs`.

    Raises:
        ValueError: the folder has a module or setting that changes its vectors and cannot be taken over; the message
            names it.
    """
    folder = _Folder(name_or_path, hub_kwargs)
    modules = folder.json("modules.json", kind=list)
    if modules is None:
        settings = None if pooling else folder.json("1_Pooling/config.json")
        return Imported(pooling or _pooling(folder, "1_Pooling", settings or {}))
    found = Imported()
    entries = [(_kind(folder, entry), _relative(folder, entry)) for entry in modules]
    if not entries or entries[0][0] != "Transformer":
        raise folder.refuse(f"{entries[0][0] if entries else 'no module'} as its first module")
    _read_transformer(folder, entries[0][1], found)
    unit_length = _read_modules(folder, entries[1:], found, pooling)
    _read_model_settings(folder, found, unit_length)
    return found


def cuts_later(name_or_path: str | os.PathLike, config: TwoDMSEConfig, **hub_kwargs) -> bool:
    """Whether the folder of a cut elastic model has a Dense module that makes its dimensions of whole token states, as
    earlier versions wrote it.

    Args:
        name_or_path: the folder or Hub name.
        config: of the model.
        hub_kwargs: those of `loading.hub_kwargs`.
    """
    if config.dim == config.hidden_size:
        return False
    folder = _Folder(str(name_or_path), hub_kwargs)
    entries = folder.json("modules.json", kind=list) or []
    path = next((_relative(folder, entry) for entry in entries if _kind(folder, entry) == "Dense"), None)
    settings = (folder.json(f"{path}/config.json") if path else None) or {}
    return (settings.get("in_features"), settings.get("out_features")) == (config.hidden_size, config.dim)


def _kind(folder: _Folder, entry: dict) -> str:
    """The class of a module: its last name if it is one of sentence-transformers, else its full name."""
    if not isinstance(entry, dict):
        raise folder.refuse(f"{json.dumps(entry)} in modules.json", "which is not a module")
    kind = str(entry.get("type", ""))
    return kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind


def _relative(folder: _Folder, entry: dict) -> str:
    path = PurePosixPath(str(entry.get("path", "")))
    if path.is_absolute() or ".." in path.parts:
        raise folder.refuse(f"a module at {path}", "which is not inside of the folder")
    return "" if str(path) == "." else str(path)


def _read_transformer(folder: _Folder, path: str, found: Imported) -> None:
    found.subfolder = path
    settings = dict(folder.json(*(f"{path}/{name}".lstrip("/") for name in _TRANSFORMER_FILES)) or {})
    for kind, names in _KEYWORDS.items():
        target = found.model_kwargs if kind == "model" else found.tokenizer_kwargs
        for name in names:
            given = _object(folder, name, settings.pop(name, None))
            target |= {key: value for key, value in given.items() if key not in _CALLERS_OWN}
    length = _whole(folder, "max_seq_length", settings.pop("max_seq_length", None))
    if length is not None:
        found.tokenizer_kwargs.setdefault("model_max_length", length)
    _whole(folder, "model_max_length", found.tokenizer_kwargs.get("model_max_length"))
    found.lower_case = bool(settings.pop("do_lower_case", False))
    modality = settings.pop("modality_config", None)
    if modality is not None and _text_output(modality) != ("forward", "last_hidden_state"):
        raise folder.refuse(
            f"the modality_config {json.dumps(modality)}", "an elastic model needs token states of text"
        )
    # What does not change the vectors of `encode`: how rows are padded, and values that are the defaults.
    settings.pop("unpad_inputs", None)
    defaults = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    changed = {name: value for name, value in settings.items() if value and value != defaults.get(name)}
    if changed:
        name, value = next(iter(changed.items()))
        raise folder.refuse(f"{name}={json.dumps(value)} for its Transformer module")


def _whole(folder: _Folder, name: str, value):
    """The value of a setting if it is None or a whole number from 1."""
    if value is not None and (type(value) is not int or value < 1):
        raise folder.refuse(f"{name}={json.dumps(value)}", "which is not a whole number from 1")
    return value


def _object(folder: _Folder, name: str, value) -> dict:
    """The value of a setting if it is a JSON object; an empty one for null."""
    if not isinstance(value or {}, dict):
        raise folder.refuse(f"{name}={json.dumps(value)}", "which is not a JSON object")
    return value or {}


def _text_output(modality: dict) -> tuple:
    text = modality.get("text") or {}
    return text.get("method"), text.get("method_output_name")


def _read_modules(folder: _Folder, entries: list[tuple[str, str]], found: Imported, pooling: str | None) -> bool:
    """Fill in pooling and Dense; whether the folder's vectors have unit length."""
    unit_length, pooled = False, False
    for kind, path in entries:
        settings = (folder.json(f"{path}/config.json") if path else None) or {}
        try:
            if kind == "Pooling" and not pooled:
                if not settings:  # the mean would be a guess
                    raise folder.refuse("a Pooling module", f"whose settings are missing in {path}/config.json")
                found.pooling, pooled, unit_length = _pooling(folder, path, settings), True, False
            elif kind == "Normalize" and pooled and _on_sentences(settings):
                unit_length = True
            elif kind == "Dense" and pooled:
                found.dense = _after(folder, path, _dense(folder, path, settings), found.dense)
                unit_length = False
            elif kind != "Dropout":  # which does nothing outside of training
                raise folder.refuse(f"the module {path or kind} ({kind})")
        except ValueError as error:
            _leave_out(error, pooling)
    if found.dense is not None and len(found.dense) > found.dense.shape[1]:
        rows, columns = found.dense.shape
        _leave_out(folder.refuse(f"a Dense module to {rows} dimensions", f"more than the encoder's {columns}"), pooling)
        found.dense, unit_length = None, False
    if not pooled and pooling is None:
        raise folder.refuse("no Pooling module", "so its vectors are not pooled token states")
    found.pooling = pooling or found.pooling
    return unit_length


def _leave_out(error: ValueError, pooling: str | None) -> None:
    if pooling is None:
        hint = "; with pooling set, for example to mean, the encoder is imported without it"
        raise ValueError(f"{error}{hint}") from error
    logger.warning(f"{error}; it is left out, because pooling is set to {pooling}")


def _after(folder: _Folder, path: str, weight: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """The product of a Dense module's matrix and of those before it."""
    if before is not None and weight.shape[1] != len(before):
        raise folder.refuse(
            f"the module {path} (Dense from {weight.shape[1]} dimensions)", f"after one to {len(before)}"
        )
    return weight if before is None else weight @ before


def _pooling(folder: _Folder, path: str, settings: dict) -> str | None:
    if not settings:
        return None
    flags = [mode for flag, mode in POOLING_FLAGS.items() if settings.get(flag)]
    modes = settings.get("pooling_mode", flags or "mean")
    modes = [modes] if isinstance(modes, str) else list(modes)
    # The vector of mean_sqrt_len has the direction of the mean, and embeddings have unit length.
    mode = "mean" if modes == ["mean_sqrt_len_tokens"] else " and ".join(modes)
    if mode not in POOLING_MODES:
        raise folder.refuse(f"the pooling {mode} in {path}")
    if not settings.get("include_prompt", True):
        raise folder.refuse(f"a pooling that leaves out the prompt (include_prompt) in {path}")
    return mode


def _on_sentences(settings: dict) -> bool:
    names = (settings.get("module_input_name"), settings.get("module_output_name"))
    return all(name in (None, "sentence_embedding") for name in names)


def _dense(folder: _Folder, path: str, settings: dict) -> torch.Tensor:
    """(out_features, in_features) of a Dense module that is a matrix."""
    extra = [name for name in ("bias", "use_residual") if settings.get(name, name == "bias")]
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _IDENTITY:
        extra.append(f"activation {str(activation).rpartition('.')[2]}")
    if not _on_sentences(settings):
        extra.append(f"input {settings.get('module_input_name')}")
    if extra:
        raise folder.refuse(f"the module {path} (Dense with {', '.join(extra)})")
    weight = _dense_weights(folder, path).get("linear.weight")
    if weight is None or weight.ndim != 2:
        raise folder.refuse(f"the module {path} (Dense)", "whose weights are not those of one linear layer")
    if not weight.is_floating_point() or not weight.isfinite().all():
        raise folder.refuse(f"the module {path} (Dense)", "whose weights are not finite floating-point numbers")
    return weight.float()


def _dense_weights(folder: _Folder, path: str) -> dict[str, torch.Tensor]:
    read: dict[str, Callable] = {
        "model.safetensors": load_file,
        "pytorch_model.bin": partial(torch.load, weights_only=True),
    }
    for name, load in read.items():
        file = folder.path(f"{path}/{name}")
        if file is not None:
            try:
                return load(file)
            except Exception as error:  # whatever the bytes of a damaged file lead to
                raise folder.refuse(f"the module {path} (Dense)", f"whose {name} cannot be read") from error
    raise folder.refuse(f"the module {path} (Dense)", "whose weights are missing")


def _read_model_settings(folder: _Folder, found: Imported, unit_length: bool) -> None:
    settings = folder.json("config_sentence_transformers.json") or {}
    kind = settings.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        raise folder.refuse(f"a {kind}", "which is not a model of one vector per text")
    found.prompts = {name: text or "" for name, text in _object(folder, "prompts", settings.get("prompts")).items()}
    found.default_prompt_name = settings.get("default_prompt_name")
    if found.default_prompt_name is not None and found.default_prompt_name not in found.prompts:
        raise folder.refuse(f"the default prompt {found.default_prompt_name!r}", "which is none of its prompts")
    found.dim = _whole(folder, "truncate_dim", settings.get("truncate_dim"))
    similarity = settings.get("similarity_fn_name")
    cut = found.dim is not None  # which sentence-transformers does after Normalize
    if similarity not in (None, "cosine", *(_LIKE_COSINE if unit_length and not cut else ())):
        differ = "" if unit_length and not cut else ", and they differ in length"
        logger.warning(
            f"{folder.name} compares its vectors by {similarity}{differ}; the elastic model's have unit length and are "
            "compared by cosine"
        )
