"""What the nested classifiers of texts and images share."""

import copy
import os
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, PreTrainedModel, default_data_collator
from transformers.utils import logging

from .backbone import check_exits, cut_config, drop_pooler, find_layer_stack, view
from .cascade import CascadeWalk, fit_thresholds
from .configuration_mrl import MatryoshkaConfig
from .head import MatryoshkaHead, nested_loss
from .outputs import CascadeOutput, MatryoshkaClassifierOutput

# What `from_backbone` hands to the configuration; anything else goes to `AutoModel.from_pretrained`.
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
# The elastic encoders whose backbone, pooling and ladder `from_backbone` takes over.
_ELASTIC = "2dmse"


class MatryoshkaClassifier(PreTrainedModel):
    """What the classifiers of texts and images share: heads, loss, cascade, cutting, saving and loading."""

    config_class = MatryoshkaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is the mean of its batch, and is not normalised by a number of items.
    accepts_loss_kwargs = False
    poolings: tuple[str, ...] = ()

    def __init__(self, config: MatryoshkaConfig):
        super().__init__(config)
        config.check()
        self._check_exits_allowed(config)
        if config.pooling not in self.poolings:
            kind = type(self).__name__
            raise ValueError(f"pooling: {config.pooling!r} is not for {kind}; choose one of {', '.join(self.poolings)}")
        self.backbone = _drop_unused_pooler(AutoModel.from_config(config.backbone_config), config.pooling)
        self.heads = nn.ModuleList(
            MatryoshkaHead(config.dims_of(n), config.num_labels, config.head_type) for n in config.exits or [None]
        )
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_path, **kwargs):
        """
        Put new heads on a pre-trained backbone.

        Args:
            name_or_path: folder or Hub name of a model that AutoModel loads; of a TwoDMSE folder the inner backbone,
                the pooling and, where no sizes are named, the ladder are taken over.
            kwargs: `sizes`, `head_type`, `pooling`, `size`, `loss_weights`, `loss_reduction`, `label_smoothing`,
                `num_labels`, `id2label`, `label2id` as in [`MatryoshkaConfig`]; anything else is passed to
                `AutoModel.from_pretrained` (`revision`, `dtype`, `attn_implementation`, ...).

        Raises:
            ValueError: a value is not allowed, or sizes name layers and the backbone's cannot be run in part.
        """
        settings = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        settings = {name: value for name, value in settings.items() if value is not None}
        if "id2label" in settings:
            settings.setdefault("label2id", {label: int(index) for index, label in settings["id2label"].items()})
        if _stored_type(name_or_path, kwargs) == MatryoshkaConfig.model_type:
            raise ValueError(
                f"name_or_path: {name_or_path} is a nested classifier already; load it with from_pretrained"
            )
        backbone = AutoModel.from_pretrained(str(name_or_path), **kwargs)
        if getattr(backbone.config, "is_encoder_decoder", False):
            raise ValueError(f"backbone: {type(backbone).__name__} has an encoder and a decoder; use one of the two")
        if backbone.config.model_type == _ELASTIC:
            settings.setdefault("pooling", backbone.config.pooling)
            settings.setdefault("sizes", backbone.config.sizes)
            backbone = backbone.backbone
        settings.setdefault("pooling", cls._default_pooling(backbone))
        # A copy, since a configuration that takes another in makes it forget which attention it runs.
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
        model.heads.to_empty(device=backbone.device).to(backbone.dtype)
        for module in model.heads.modules():
            model._init_weights(module)
        if os.path.isdir(str(name_or_path)):
            backbone.config.name_or_path = ""  # a folder of this machine says nothing to whoever loads the model
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        Load a saved classifier; `size="2x64"` chooses whose logits are `logits`.

        Raises:
            ValueError: the weights do not fill the model, which would leave some of them random.
        """
        stored = _stored_type(pretrained_model_name_or_path, kwargs)
        if stored != MatryoshkaConfig.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a model of type {stored} is no nested classifier; "
                f"{cls.__name__}.from_backbone puts new heads on it"
            )
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        if absent:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights lack {len(absent)} of the tensors that config.json asks "
                f"for, {absent[0]} among them; they would be random"
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save a folder that the task's own AutoModel class and plain AutoModel load, each as this classifier."""
        module = type(self).__module__.rpartition(".")[2]
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**auto_map, "AutoModel": f"{module}.{type(self).__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)

    def truncate(self, size=None):
        """
        The classifier of one size alone, a model in its own right: no deeper layers, no other columns or heads.

        Args:
            size: as in `config.sizes`, the chosen one when left out; a tied head gives any number of dimensions up to
                its largest. The backbone's weights share this model's memory until one of the two is moved or
                converted.
        """
        size = self.config.find_size(size)
        config = copy.deepcopy(self.config)
        config.size = config.loss_weights = config.thresholds = None
        backbone = self.backbone
        if size.num_layers is not None:
            backbone = _first_layers(backbone, config.layer_stack, size.num_layers)
            config.backbone_config = backbone.config
        config.set_sizes([size])
        with torch.device("meta"):
            small = type(self)(config)
        small.backbone = backbone
        small.heads = nn.ModuleList([self.heads[self._exits.index(size.num_layers)].cut(size.dim)])
        return small.train(self.training)

    @torch.no_grad()
    def fit_cascade(
        self, dataset, data_collator: Callable | None = None, batch_size: int = 32, disable_tqdm: bool | None = None
    ) -> list[float]:
        """
        Choose the cascade's thresholds and store them in `config.thresholds`; see `cascade.fit_thresholds`.

        Args:
            dataset: rows of what forward takes, `labels` (or `label`) included, which no head was trained on and on
                which the cascade will not be judged.
            data_collator: from a list of rows to a batch; transformers' `default_data_collator` when left out, which
                cannot pad (`DataCollatorWithPadding` does).
            batch_size: rows a batch.
            disable_tqdm: no progress bar; by default there is one on a terminal.

        Returns:
            one threshold a size but the largest.

        Raises:
            ValueError: there is one size alone, or rows have no labels, or all have the same.
        """
        if len(self.config.sizes) < 2:
            raise ValueError(f"sizes: a cascade needs at least two sizes, and there is {self.config.sizes[0]} alone")
        logits, labels = self.collect_logits(dataset, data_collator, batch_size, disable_tqdm)
        if labels is None:
            raise ValueError("dataset: its rows have no labels, which a cascade is fitted on")
        self.config.thresholds = fit_thresholds(logits, labels)
        return self.config.thresholds

    @torch.no_grad()
    def collect_logits(self, dataset, data_collator=None, batch_size: int = 32, disable_tqdm: bool | None = None):
        """Logits of every size on a dataset (arguments as in `fit_cascade`), all layers run.

        Returns:
            (sizes, rows, classes) in float32 on the CPU, and (rows,) labels or None.
        """
        if not len(dataset):
            raise ValueError("dataset: there are no rows")
        loader = DataLoader(dataset, batch_size, collate_fn=data_collator or default_data_collator)
        logits, labels = [], []
        training = self.training
        self.eval()
        try:
            for batch in logging.tqdm(loader, desc="Classifying", leave=False, disable=disable_tqdm):
                batch = {name: value.to(self.device) for name, value in batch.items()}
                labels.append(batch.pop("labels", None))
                logits.append(self(**batch).size_logits.cpu())
        finally:
            self.train(training)
        return torch.cat(logits, dim=1), None if labels[0] is None else torch.cat(labels).cpu()

    @torch.no_grad()
    def predict_cascade(self, inputs: Mapping[str, torch.Tensor]) -> CascadeOutput:
        """
        Classify each sample at the first size that is confident, small to large (MRL, section 4.2.1).

        Samples that are confident leave the batch, and no further layer runs for them; a tied head adds, for those that
        stay, the new columns' part alone.

        Args:
            inputs: what forward takes, without labels; a tokenizer's or image processor's output.

        Raises:
            ValueError: the cascade was not fitted.
        """
        thresholds = self.config.thresholds
        if thresholds is None:
            raise ValueError("thresholds: this cascade is not fitted; call fit_cascade with held-out data first")
        self.config.check()
        inputs = {name: value for name, value in inputs.items() if name != "labels" and value is not None}
        heads = dict(zip(self._exits, self.heads, strict=True))
        batch = len(next(iter(inputs.values())))
        walk = CascadeWalk(self.config.ladder, heads, thresholds, batch, self.device)
        training = self.training
        self.eval()
        try:
            layers = self._walk(inputs, walk)
        finally:
            self.train(training)
        return CascadeOutput(walk.labels, walk.sizes, walk.confidences, walk.dims, layers)

    @property
    def _exits(self) -> list[int | None]:
        return self.config.exits or [None]

    def _classify(self, states: list[torch.Tensor], labels, size) -> MatryoshkaClassifierOutput:
        """From the pooled states of each exit, (batch, D), to the output."""
        config, chosen = self.config, self.config.find_size(size)
        logits = torch.cat([head(state) for head, state in zip(self.heads, states, strict=True)])
        if chosen in config.ladder:
            own = logits[config.ladder.index(chosen)]
        else:
            index = self._exits.index(chosen.num_layers)
            own = self.heads[index].logits(states[index], chosen.dim)
        loss, losses = None, None
        if labels is not None:
            loss, losses = nested_loss(
                logits, labels, config.loss_weights, config.loss_reduction, config.label_smoothing
            )
        return MatryoshkaClassifierOutput(loss, losses, own, logits.transpose(0, 1))

    def _walk(self, inputs: dict[str, torch.Tensor], walk: CascadeWalk) -> torch.Tensor | None:
        walk.visit(None, self._pooled(inputs)[0], torch.arange(walk.batch, device=self.device))
        return None

    def _pooled(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Pooled states of each exit, (batch, D) in float32; the classes of texts and of images say how."""
        raise NotImplementedError

    @staticmethod
    def _default_pooling(backbone: PreTrainedModel) -> str:
        """What suits a backbone where no pooling is named; the classes of texts and of images say it."""
        raise NotImplementedError

    @classmethod
    def _check_exits_allowed(cls, config: MatryoshkaConfig) -> None:
        """ValueError where heads cannot stand on several exits."""


def _stored_type(name_or_path, kwargs: dict) -> str | None:
    """What a folder or repository says it is a model of; `kwargs` are those of `from_pretrained`."""
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    hub = {name: kwargs[name] for name in names if name in kwargs}
    return MatryoshkaConfig.get_config_dict(str(name_or_path), **hub)[0].get("model_type")


def _drop_unused_pooler(backbone: PreTrainedModel, pooling: str) -> PreTrainedModel:
    """Without the learned pooler that `pooling` does not read; one without weights may be part of the forward."""
    pooler = getattr(backbone, "pooler", None)
    learned = isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters())
    return drop_pooler(backbone) if learned and pooling != "pooler" else backbone


def _first_layers(backbone: PreTrainedModel, stack: str, num_layers: int) -> PreTrainedModel:
    """The backbone cut to its first layers, which it shares the memory of."""
    if num_layers == backbone.config.num_hidden_layers:
        return backbone
    small = view(backbone, stack, backbone.get_submodule(stack)[:num_layers])
    small.config = cut_config(backbone.config, num_layers)
    small.config._attn_implementation = backbone.config._attn_implementation  # a copy forgets it
    return small


__all__ = ["MatryoshkaClassifier"]
