"""Pre-train nested clusters on pictures: `accelerate launch run_scripts/pretrain_franca.py [RECIPE] [--flag ...]`.

OUT holds student, teacher and heads, OUT/backbone the teacher's backbone as a plain checkpoint of its family.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, BitImageProcessorPil, set_seed
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_franca import FrancaConfig, FrancaForPretraining
from run_scripts.shared import cli, models, runs
from run_scripts.shared.pictures import read_pictures
from trainer.franca.trainer import FrancaTrainer, FrancaTrainingArguments


@dataclass
class ModelArguments:
    """What is pre-trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a vision transformer (Dinov2, DINOv3, ViT) to start from, or an "
                  "earlier output of this script."},
    )  # fmt: skip
    backbone_config: str | None = field(
        default=None,
        metadata={"help": 'Configuration of a new backbone, as JSON: {"model_type": "dinov2", "hidden_size": 192, '
                  '"image_size": 64, "patch_size": 8, ...}.'},
    )  # fmt: skip


@dataclass
class FrancaSettings:
    """Fields of FrancaConfig; what is left out has its default there."""

    nesting_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Prefixes with a head of their own, the last one the hidden size D; D alone is flat. "
                  "Default: D/16 D/8 D/4 D/2 D."},
    )  # fmt: skip
    head_input: str | None = field(
        default=None, metadata={"help": "What a head sees: slice (default) or projection, as in the released code."}
    )
    num_prototypes: int | None = field(default=None, metadata={"help": "Prototypes of size D; others in proportion."})
    head_num_layers: int | None = field(default=None, metadata={"help": "Layers of each head's MLP."})
    head_hidden_size: int | None = field(default=None, metadata={"help": "Its inner width."})
    head_bottleneck_size: int | None = field(default=None, metadata={"help": "Dimensions of its prototypes."})
    student_temperature: float | None = field(default=None, metadata={"help": "Of the student's logits."})
    teacher_temperature: float | None = field(default=None, metadata={"help": "Of the teacher's, after its rise."})
    initial_teacher_temperature: float | None = field(default=None, metadata={"help": "Where it starts."})
    teacher_temperature_warmup: float | None = field(
        default=None, metadata={"help": "Share of all steps in which it rises."}
    )
    momentum: float | None = field(default=None, metadata={"help": "Of the teacher at the first step."})
    final_momentum: float | None = field(default=None, metadata={"help": "And at the last."})
    sinkhorn_iterations: int | None = field(default=None, metadata={"help": "Of the teacher's assignments."})
    patch_weight: float | None = field(default=None, metadata={"help": "Factor of the loss at masked patches."})
    koleo_weight: float | None = field(default=None, metadata={"help": "Factor of the KoLeo regulariser."})


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it sees. No labels are read."""

    train_dir: str | None = field(default=None, metadata={"help": "Folder of pictures, or of folders of pictures."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, in place of train_dir."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the pictures."})


def main(argv=None) -> None:
    """Parse, check everything, pre-train, save."""
    runs.use_all_cores()
    with cli.user_errors():
        parser = cli.Parser((ModelArguments, FrancaSettings, DataArguments, FrancaTrainingArguments))
        model_args, settings, data, args = parser.parse(argv)
        resume = runs.find_checkpoint(args)
        runs.check_output_dir(args.output_dir, allowed=bool(resume) or data.overwrite)
        set_seed(args.seed)
        model = _load_model(model_args, settings)
        pictures = read_pictures(
            "train", data.train_dir, data.dataset_name, data.dataset_config, data.train_split, data.image_column
        )
        trainer = FrancaTrainer(model=model, args=args, train_dataset=pictures)
        previous = runs.move_aside(args) if data.overwrite and not resume else None
    with runs.training_errors(trainer):
        trainer.train(resume_from_checkpoint=resume)
    backbone = os.path.join(args.output_dir, "backbone")
    with runs.training_errors(trainer):
        trainer.save_model()
        if args.should_save:
            trainer.model.teacher.save_backbone(backbone)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
        runs.remove(previous)
        print(f"\nMeasure it: python run_scripts/evaluate_franca.py --model_name_or_path {args.output_dir} ...")
    trainer.accelerator.end_training()


def _load_model(model_args: ModelArguments, settings: FrancaSettings) -> FrancaForPretraining:
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    if (model_args.model_name_or_path is None) == (model_args.backbone_config is None):
        raise ValueError("model_name_or_path: name the backbone with either --model_name_or_path or --backbone_config")
    if model_args.backbone_config is not None:
        config = _read_backbone_config(model_args.backbone_config)
        model = FrancaForPretraining(FrancaConfig(config, **given))
        model.image_processor = _new_processor(config.image_size)
        return model
    path = models.resolve_model(model_args.model_name_or_path)
    if models.read_config(path).model_type != FrancaConfig.model_type:
        model = FrancaForPretraining.from_backbone(path, **given)
    elif given:
        raise ValueError(f"{next(iter(given))}: {path} brings its own settings; leave --{next(iter(given))} out")
    else:
        model = FrancaForPretraining.from_pretrained(path)
    model.image_processor = AutoImageProcessor.from_pretrained(path)
    return model


def _read_backbone_config(text: str):
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"backbone_config: {text} is not JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f'backbone_config: {text} must be like {{"model_type": "dinov2", "hidden_size": 192}}')
    try:
        return AutoConfig.for_model(**values)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"backbone_config: {error}") from error


def _new_processor(size: int | Sequence[int]) -> BitImageProcessorPil:
    """Dinov2's, for a new backbone's pictures."""
    height, width = (size, size) if isinstance(size, int) else size
    return BitImageProcessorPil(
        size={"shortest_edge": min(height, width)},
        crop_size={"height": height, "width": width},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


if __name__ == "__main__":
    main()
