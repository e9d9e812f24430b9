"""Making an elastic model of a pre-trained encoder, with what its sentence-transformers folder declares."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from .backbone import check_exits, find_layer_stack
from .configuration_2dmse import Size, TwoDMSEConfig
from .import_checks import check_origin, check_padding, check_reload, reads_left_to_right
from .loading import auto_kwargs, hub_kwargs, load_backbone, tokenizer_kwargs
from .projection import ExitProjection
from .sentence_transformers_import import Imported, read_folder
from .tokens import lower_cased

if TYPE_CHECKING:
    from .modeling_2dmse import TwoDMSEModel


def import_backbone(
    kind: type["TwoDMSEModel"],
    name_or_path: str,
    sizes: Iterable[str | Size] | None,
    pooling: str | None,
    prompts: dict[str, str] | None,
    kwargs: dict,
) -> "TwoDMSEModel":
    """The elastic model around a pre-trained encoder; see `TwoDMSEModel.from_backbone` for the arguments and errors."""
    found = read_folder(name_or_path, pooling, **hub_kwargs(kwargs))
    kwargs = {**found.model_kwargs, **kwargs}
    if found.subfolder:
        kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), found.subfolder)
    options = auto_kwargs(kwargs)
    backbone = load_backbone(name_or_path, **{**kwargs, **options})
    if getattr(backbone, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"name_or_path: {name_or_path} has adapters of PEFT; merge them into their model first, with "
            "merge_and_unload(), and import what save_pretrained() then writes"
        )
    if isinstance(backbone, kind):
        raise ValueError(f"name_or_path: {name_or_path} is an elastic model already; load it with from_pretrained")
    check_origin(backbone)
    model = _around(kind, backbone, found, sizes, prompts)
    if os.path.isdir(name_or_path):
        backbone.config.name_or_path = ""  # a local path means nothing to whoever loads the model
    model.config.name_or_path = model.name_or_path = name_or_path  # PEFT reads the latter
    # Without config, the tokenizer's loading would read another one.
    model._hub_kwargs = {**tokenizer_kwargs(name_or_path, options), **found.tokenizer_kwargs, "config": backbone.config}
    if found.lower_case:
        model.tokenizer = lower_cased(model.tokenizer)
    return model.eval()


def _around(
    kind: type["TwoDMSEModel"], backbone: PreTrainedModel, found: Imported, sizes, prompts: dict[str, str] | None
) -> "TwoDMSEModel":
    stack, attention = find_layer_stack(backbone), backbone.config._attn_implementation
    no_pooler = hasattr(backbone, "pooler")
    check_padding(backbone, no_pooler)
    config = TwoDMSEConfig(
        backbone_config=backbone.config,
        pooling=found.pooling or ("lasttoken" if reads_left_to_right(backbone) else "mean"),
        sizes=sizes,
        dim=_kept_dim(found, backbone.config.hidden_size),
        prompts=found.prompts | (prompts or {}),
        default_prompt_name=found.default_prompt_name,
        layer_stack=stack,
        final_norm=check_exits(backbone, stack),
        dtype=backbone.dtype,
    )
    if found.dense is not None and any(size.dim > len(found.dense) for size in config.ladder):
        raise ValueError(f"sizes: the Dense module of the folder gives {len(found.dense)} dimensions, no size has more")
    with torch.device("meta"):
        model = kind(config)
    check_reload(backbone, model.backbone, stack, config.final_norm)
    backbone.config._attn_implementation = attention  # a new configuration or model chooses again
    model.backbone = backbone
    model.config.backbone_config = backbone.config
    if found.dense is not None:
        _take_over_dense(model, found.dense)
    return model


def _kept_dim(found: Imported, hidden_size: int) -> int | None:
    """Dimensions of the folder's vectors; None for all those of the encoder."""
    if found.dense is None:
        return None if found.dim is None else min(found.dim, hidden_size)
    rows, columns = found.dense.shape
    if columns != hidden_size or rows > hidden_size:
        raise ValueError(
            f"name_or_path: the Dense module of the folder maps {columns} to {rows} dimensions; it can be taken over "
            f"from {hidden_size}, the encoder's, to as many or fewer"
        )
    return rows if found.dim is None else min(found.dim, rows)


@torch.no_grad()
def _take_over_dense(model: "TwoDMSEModel", dense: torch.Tensor) -> None:
    """Make a (dim, hidden) matrix the first rows of every exit's projection; the other rows are 0."""
    rows, hidden = dense.shape
    if torch.equal(dense, torch.eye(rows, hidden)):
        return  # it only cuts the vectors, as `config.dim` does
    model.add_exit_projections()
    for projection in model.exit_projections or ():
        assert isinstance(projection, ExitProjection)
        projection.weight.zero_()
        projection.weight[:rows] = dense.to(projection.weight)
