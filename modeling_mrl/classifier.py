"""The base class of the nested classifiers of texts and images."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Self, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, PreTrainedModel, default_data_collator
from transformers.utils import logging

from .backbone import (
    check_device_map,
    check_exits,
    check_one_stack,
    cut_config,
    drop_pooler,
    find_layer_stack,
    layers_of,
    view,
)
from .cascade import CascadeWalk, fit_thresholds
from .configuration_mrl import MatryoshkaConfig, Size
from .file_modes import share_weights
from .head import MatryoshkaHead, nested_loss
from .outputs import CascadeOutput, MatryoshkaClassifierOutput
from .running import execution_device, inference_twin

# Arguments of `from_backbone` for the configuration; all others are passed to `AutoModel.from_pretrained`.
_SETTINGS = (
    "sizes",
    "head_type",
    "pooling",
    "size",
    "loss_weights",
    "loss_reduction",
    "label_smoothing",
    "num_labels",
    "id2label",
    "label2id",
)
# Model type of the elastic encoders; `from_backbone` takes over their backbone, pooling and ladder.
_ELASTIC = "2dmse"


class MatryoshkaClassifier(PreTrainedModel):
    """Base class of the classifiers of texts and images: heads, loss, cascade, cutting, saving and loading."""

    config: MatryoshkaConfig
    backbone: PreTrainedModel
    heads: nn.ModuleList

    config_class = MatryoshkaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over the batch, and is not divided by a number of items.
    accepts_loss_kwargs = False
    poolings: tuple[str, ...] = ()

    def __init__(self, config: MatryoshkaConfig):
        super().__init__(config)
        config.check()
        self._check_exits_allowed(config)
        if config.pooling not in self.poolings:
            kind = type(self).__name__
            raise ValueError(
                f"pooling: {config.pooling!r} does not work with {kind}; choose one of {', '.join(self.poolings)}"
            )
        self.backbone = _drop_unused_pooler(
            AutoModel.from_config(config.backbone_config, trust_remote_code=False), config.pooling
        )
        self.heads = nn.ModuleList(
            MatryoshkaHead(config.dims_of(n), cast(int, config.num_labels), config.head_type) for n in self._exits
        )
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_path: str | os.PathLike, **kwargs) -> Self:
        """Put new heads on a pre-trained backbone.

        Args:
            name_or_path: folder or Hub name of a model that AutoModel loads. From a TwoDMSE folder, the inner backbone,
                the pooling and (if no sizes are given) the ladder are taken.
            kwargs: `sizes`, `head_type`, `pooling`, `size`, `loss_weights`, `loss_reduction`, `label_smoothing`,
                `num_labels`, `id2label`, `label2id` as in `MatryoshkaConfig`; all others are passed to
                `AutoModel.from_pretrained` (`revision`, `dtype`, `attn_implementation`, ...).

        Returns:
            The classifier, in evaluation mode.

        Raises:
            ValueError: a value is not allowed, layers have no weights, or the sizes name layers and the backbone cannot
                be run in part.
        """
        settings = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        settings = {name: value for name, value in settings.items() if value is not None}
        if "id2label" in settings:
            settings.setdefault("label2id", {label: int(index) for index, label in settings["id2label"].items()})
        if _stored_type(name_or_path, kwargs) == MatryoshkaConfig.model_type:
            raise ValueError(
                f"name_or_path: {name_or_path} is a nested classifier already; load it with from_pretrained"
            )
        # Without the word, transformers would ask on standard input whether to run code that it finds.
        trusted = bool(kwargs.pop("trust_remote_code", False))
        kwargs |= {"trust_remote_code": trusted, "output_loading_info": True}
        backbone, info = AutoModel.from_pretrained(str(name_or_path), **kwargs)
        check_one_stack(backbone)
        check_device_map(backbone, name_or_path)
        # A pooler and a mask token are often new; the heads are trained with them.
        used = {name for name, _ in backbone.named_parameters() if "pooler" not in name and "mask_token" not in name}
        _check_filled(used & set(info["missing_keys"]), name_or_path)
        if backbone.config.model_type == _ELASTIC:
            settings.setdefault("pooling", backbone.config.pooling)
            settings.setdefault("sizes", backbone.config.sizes)
            backbone = backbone.backbone
        settings.setdefault("pooling", cls._default_pooling(backbone))
        # A copy, because MatryoshkaConfig resets the attention implementation of the configuration that it is given.
        config = MatryoshkaConfig(backbone_config=copy.deepcopy(backbone.config), dtype=backbone.dtype, **settings)
        backbone = _drop_unused_pooler(backbone, config.pooling)
        if config.exits:
            cls._check_exits_allowed(config)
            config.layer_stack = find_layer_stack(backbone)
            config.final_norm = check_exits(backbone, config.layer_stack)
            backbone = _first_layers(backbone, config.layer_stack, config.exits[-1])
        config.backbone_config = backbone.config
        config._attn_implementation = backbone.config._attn_implementation
        with torch.device("meta"):
            model = cls(config)
        model.backbone = backbone
        model.heads.to_empty(device=execution_device(backbone)).to(backbone.dtype)
        for module in model.heads.modules():
            model._init_weights(module)
        if os.path.isdir(str(name_or_path)):
            backbone.config.name_or_path = ""  # a local path means nothing to whoever loads the model
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a saved classifier.

        Args:
            pretrained_model_name_or_path: folder or Hub name of a nested classifier.
            args: those of `PreTrainedModel.from_pretrained`.
            kwargs: those of `PreTrainedModel.from_pretrained`, and fields of the configuration: `size="2x64"` chooses
                the size whose logits are `logits`, also with a `config`.

        Raises:
            ValueError: it is another kind of model, or the weights do not fill the model.
        """
        stored = _stored_type(pretrained_model_name_or_path, kwargs)
        if stored != MatryoshkaConfig.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a model of type {stored} is not a nested classifier; "
                f"{cls.__name__}.from_backbone puts new heads on it"
            )
        wants_info, config = kwargs.pop("output_loading_info", False), kwargs.get("config")
        if "size" in kwargs and getattr(config, "model_type", None) == MatryoshkaConfig.model_type:
            kwargs["config"] = copy.deepcopy(config)
            kwargs["config"].size = kwargs.pop("size")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[Self, dict]", loaded)
        absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        _check_filled(absent, pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Save a folder that both the task's AutoModel class and plain AutoModel load as this classifier.

        Args:
            save_directory: the folder.
            args: those of `PreTrainedModel.save_pretrained`.
            kwargs: those of `PreTrainedModel.save_pretrained`.
        """
        module = type(self).__module__.rpartition(".")[2]
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**auto_map, "AutoModel": f"{module}.{type(self).__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            share_weights(save_directory)

    def truncate(self, size: int | str | Size | None = None) -> Self:
        """The classifier of only one size: no deeper layers, no other columns or heads.

        The backbone's weights share memory with this model until one of the two is moved or converted.

        Args:
            size: as in `config.sizes`; default: the size whose logits are `logits`. A tied head gives any number of
                dimensions up to its largest.

        Raises:
            ValueError: there is no trained head for `size`.
        """
        chosen = self.config.find_size(size)
        config = copy.deepcopy(self.config)
        config.size = config.loss_weights = config.thresholds = None
        backbone = self.backbone
        if chosen.num_layers is not None:
            backbone = _first_layers(backbone, config.layer_stack, chosen.num_layers)
            config.backbone_config = backbone.config
        config.set_sizes([chosen])
        with torch.device("meta"):
            small = type(self)(config)
        small.backbone = backbone
        small.heads = nn.ModuleList([self._head_of(chosen.num_layers).cut(chosen.dim)])
        return small.train(self.training)

    @torch.no_grad()
    def fit_cascade(
        self, dataset, data_collator: Callable | None = None, batch_size: int = 32, disable_tqdm: bool | None = None
    ) -> list[float]:
        """Choose the cascade's thresholds and store them in `config.thresholds`; see `cascade.fit_thresholds`.

        Args:
            dataset: rows with the arguments of forward, including `labels` (or `label`). No head may have been trained
                on them, and the cascade must not be evaluated on them.
            data_collator: from a list of rows to a batch; default: transformers' `default_data_collator`, which does
                not pad (`DataCollatorWithPadding` does).
            batch_size: rows per batch.
            disable_tqdm: whether to show no progress bar; default: shown on a terminal, for several batches.

        Returns:
            One threshold for each size but the largest.

        Raises:
            ValueError: there is only one size, the rows have no labels, or all have the same label.
        """
        if len(self.config.sizes) < 2:
            raise ValueError(f"sizes: a cascade needs at least two sizes, but there is only {self.config.sizes[0]}")
        logits, labels = self.collect_logits(dataset, data_collator, batch_size, disable_tqdm)
        if labels is None:
            raise ValueError("dataset: its rows have no labels, which are needed to fit a cascade")
        self.config.thresholds = fit_thresholds(logits, labels)
        return self.config.thresholds

    @torch.no_grad()
    def collect_logits(
        self, dataset, data_collator: Callable | None = None, batch_size: int = 32, disable_tqdm: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of every size on a dataset, with all layers run; arguments as in `fit_cascade`.

        Returns:
            (sizes, rows, classes) in float32 on the CPU, and (rows,) labels, or None if there are none.

        Raises:
            ValueError: the dataset has no rows.
        """
        if not len(dataset):
            raise ValueError("dataset: there are no rows")
        loader = DataLoader(dataset, batch_size, collate_fn=data_collator or default_data_collator)
        logits, labels = [], []
        model, device = inference_twin(self), execution_device(self)
        if disable_tqdm is None and len(loader) == 1:
            disable_tqdm = True
        for batch in logging.tqdm(loader, desc="Classifying", leave=False, disable=disable_tqdm):
            batch = {name: value.to(device) for name, value in batch.items()}
            labels.append(batch.pop("labels", None))
            logits.append(model(**batch).size_logits.cpu())
        return torch.cat(logits, dim=1), None if labels[0] is None else torch.cat(labels).cpu()

    @torch.no_grad()
    def predict_cascade(self, inputs: Mapping[str, torch.Tensor]) -> CascadeOutput:
        """Classify each sample at the first size that is confident, small to large (MRL, section 4.2.1).

        Confident samples leave the batch, and no deeper layer runs for them. For the samples that stay, a tied head
        computes only the part of the new columns.

        Args:
            inputs: arguments of forward, without labels: the output of a tokenizer or an image processor.

        Raises:
            ValueError: the cascade was not fitted.
        """
        thresholds = self.config.thresholds
        if thresholds is None:
            raise ValueError("thresholds: this cascade is not fitted; call fit_cascade with held-out data first")
        self.config.check()
        inputs = {name: value for name, value in inputs.items() if name != "labels" and value is not None}
        model = cast(Self, inference_twin(self))
        heads = {n: model._head_of(n) for n in self._exits}
        batch = len(next(iter(inputs.values())))
        walk = CascadeWalk(self.config.ladder, heads, thresholds, batch, execution_device(self))
        layers = model._walk(inputs, walk)
        return CascadeOutput(walk.labels, walk.sizes, walk.confidences, walk.dims, layers)

    @property
    def _exits(self) -> list[int | None]:
        """Exits that have heads; None is the end of the backbone."""
        return [*self.config.exits] or [None]

    def _head_of(self, exit_: int | None) -> MatryoshkaHead:
        return cast(MatryoshkaHead, self.heads[self._exits.index(exit_)])

    def _classify(
        self, states: list[torch.Tensor], labels: torch.Tensor | None, size: int | str | Size | None
    ) -> MatryoshkaClassifierOutput:
        """The output, from the pooled states of each exit, (batch, D)."""
        config, chosen = self.config, self.config.find_size(size)
        logits = torch.cat([head(state) for head, state in zip(self.heads, states, strict=True)])
        if chosen in config.ladder:
            own = logits[config.ladder.index(chosen)]
        else:
            state = states[self._exits.index(chosen.num_layers)]
            own = self._head_of(chosen.num_layers).logits(state, chosen.dim)
        loss, losses = None, None
        if labels is not None:
            loss, losses = nested_loss(
                logits, labels, config.loss_weights, config.loss_reduction, config.label_smoothing
            )
        return MatryoshkaClassifierOutput(loss, losses, own, logits.transpose(0, 1))

    def _walk(self, inputs: Mapping[str, torch.Tensor], walk: CascadeWalk) -> torch.Tensor | None:
        """Take a batch through the cascade; returns the layers that ran for each row, None without exits."""
        walk.visit(None, self._pooled(inputs)[0], torch.arange(walk.batch, device=execution_device(self)))
        return None

    def _pooled(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Pooled states of each exit, (batch, D) in float32."""
        raise NotImplementedError

    @staticmethod
    def _default_pooling(backbone: PreTrainedModel) -> str:
        """The pooling for a backbone if none is named."""
        raise NotImplementedError

    @classmethod
    def _check_exits_allowed(cls, config: MatryoshkaConfig) -> None:
        """ValueError if the sizes name layers and this class does not support heads at several exits."""


def _check_filled(absent: Iterable[str], name_or_path: object) -> None:
    """ValueError if `from_pretrained` found no weights for some tensors."""
    names = sorted(absent)
    if names:
        raise ValueError(
            f"{name_or_path}: the weights lack {len(names)} of the tensors that config.json asks for, for example "
            f"{names[0]}; they would be random"
        )


def _stored_type(name_or_path: str | os.PathLike, kwargs: dict) -> str | None:
    """The model type in the config.json of a folder or repository; `kwargs` are those of `from_pretrained`."""
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    hub = {name: kwargs[name] for name in names if name in kwargs}
    return MatryoshkaConfig.get_config_dict(str(name_or_path), **hub)[0].get("model_type")


def _drop_unused_pooler(backbone: PreTrainedModel, pooling: str) -> PreTrainedModel:
    """Drop a learned pooler that `pooling` does not read; a pooler without weights may be needed in the forward."""
    pooler = getattr(backbone, "pooler", None)
    learned = isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters())
    return drop_pooler(backbone) if learned and pooling != "pooler" else backbone


def _first_layers(backbone: PreTrainedModel, stack: str, num_layers: int) -> PreTrainedModel:
    """The backbone cut to its first layers, which share memory with it."""
    if num_layers == backbone.config.num_hidden_layers:
        return backbone
    small = cast(PreTrainedModel, view(backbone, stack, [*layers_of(backbone, stack)[:num_layers]]))
    small.config = cut_config(backbone.config, num_layers)
    small.config._attn_implementation = backbone.config._attn_implementation  # it is not copied
    return small


__all__ = ["MatryoshkaClassifier"]
