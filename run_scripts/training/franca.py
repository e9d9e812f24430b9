"""What pretrain_franca.py loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, BitImageProcessorPil, set_seed
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_2dmse.loading import check_weights
from modeling_franca import FrancaConfig, FrancaForPretraining
from run_scripts.shared import models, remote_code
from run_scripts.shared.pictures import read_pictures
from trainer.franca.arguments import FrancaTrainingArguments
from trainer.franca.trainer import FrancaTrainer

if TYPE_CHECKING:
    from run_scripts.pretrain_franca import DataArguments, FrancaSettings, ModelArguments


def make_trainer(
    model_args: ModelArguments, settings: FrancaSettings, data: DataArguments, args: FrancaTrainingArguments
) -> FrancaTrainer:
    """The trainer with its model and images; ValueError for anything that cannot be trained."""
    set_seed(args.seed)
    model = _load_model(model_args, settings)
    pictures = read_pictures(
        "train", data.train_dir, data.dataset_name, data.dataset_config, data.train_split, data.image_column
    )
    return FrancaTrainer(model=model, args=args, train_dataset=pictures)


def _load_model(model_args: ModelArguments, settings: FrancaSettings) -> FrancaForPretraining:
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    if model_args.backbone_config is not None:
        config = _read_backbone_config(model_args.backbone_config)
        model = FrancaForPretraining(FrancaConfig(config, **given))
        model.image_processor = _new_processor(config.image_size)
        return model
    path = models.resolve_model(model_args.model_name_or_path)
    trust = {"trust_remote_code": model_args.trust_remote_code}
    with remote_code.named(path):
        if models.read_config(path, **trust).model_type != FrancaConfig.model_type:
            model = FrancaForPretraining.from_backbone(path, **trust, **given)
        elif given:
            raise ValueError(f"{next(iter(given))}: {path} has its own settings; leave --{next(iter(given))} out")
        else:
            model = FrancaForPretraining.from_pretrained(path, **trust)
        check_weights(model, path)
        model.image_processor = AutoImageProcessor.from_pretrained(path, **trust)
    return model


def _read_backbone_config(text: str):
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"backbone_config: {text[:200]} is not JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f'backbone_config: {text} must be like {{"model_type": "dinov2", "hidden_size": 192}}')
    try:
        return AutoConfig.for_model(**values)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"backbone_config: {error}") from error


def _new_processor(size: int | Sequence[int]) -> BitImageProcessorPil:
    """The image processor of Dinov2, for the images of a new backbone."""
    height, width = (size, size) if isinstance(size, int) else size
    return BitImageProcessorPil(
        size={"shortest_edge": min(height, width)},
        crop_size={"height": height, "width": width},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
