"""Pre-train nested clusters on images: `accelerate launch run_scripts/pretrain_franca.py [RECIPE] [--flag ...]`.

OUT contains student, teacher and heads; OUT/backbone the teacher's backbone as a plain checkpoint of its family.
"""

import os
from dataclasses import dataclass, field

from run_scripts.shared import checks, cli, early, remote_code, runs  # noqa: F401 (early acts when imported)
from trainer.franca.arguments import FrancaTrainingArguments


@dataclass
class ModelArguments:
    """What is pre-trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a vision transformer (Dinov2, DINOv3, ViT) to start from, or an "
                  "earlier output of this script."},
    )  # fmt: skip
    backbone_config: str | None = field(
        default=None,
        metadata={"help": 'Configuration of a new backbone: {"model_type": "dinov2", "hidden_size": 192, '
                  '"image_size": 64, "patch_size": 8, ...}.', "metavar": "JSON"},
    )  # fmt: skip
    trust_remote_code: bool = remote_code.trust_flag()


@dataclass
class FrancaSettings:
    """Fields of FrancaConfig; a field that is not given has its default there."""

    nesting_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Prefixes that have their own head, the last one the hidden size D; only D is flat. "
                  "Default: D/16 D/8 D/4 D/2 D."},
    )  # fmt: skip
    head_input: str | None = field(
        default=None, metadata={"help": "What a head sees: slice (default) or projection, as in the released code."}
    )
    head_output: str | None = field(
        default=None, metadata={"help": "End of a head's MLP: unit (default), or gelu, as in the released code."}
    )
    num_prototypes: int | None = field(default=None, metadata={"help": "Prototypes of size D; others in proportion."})
    head_num_layers: int | None = field(default=None, metadata={"help": "Layers of each head's MLP."})
    head_hidden_size: int | None = field(default=None, metadata={"help": "Inner width of that MLP."})
    head_bottleneck_size: int | None = field(default=None, metadata={"help": "Dimensions of a head's prototypes."})
    student_temperature: float | None = field(default=None, metadata={"help": "Temperature of the student."})
    teacher_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the teacher after its rise."}
    )
    initial_teacher_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the teacher at first."}
    )
    teacher_temperature_warmup: float | None = field(
        default=None, metadata={"help": "Share of all steps during which it rises."}
    )
    momentum: float | None = field(default=None, metadata={"help": "Momentum of the teacher at the first step."})
    final_momentum: float | None = field(default=None, metadata={"help": "Momentum of the teacher at the last step."})
    sinkhorn_iterations: int | None = field(default=None, metadata={"help": "Sinkhorn iterations per assignment."})
    patch_weight: float | None = field(default=None, metadata={"help": "Factor of the loss at masked patches."})
    koleo_weight: float | None = field(default=None, metadata={"help": "Factor of the KoLeo regularizer."})
    koleo_reduction: str | None = field(
        default=None, metadata={"help": "KoLeo over the large crops: mean (default), or sum, as in the released code."}
    )


@dataclass
class DataArguments(runs.OverwriteArguments):
    """What it sees. No labels are read."""

    _argument_group_name = "data"

    train_dir: str | None = field(default=None, metadata={"help": "Folder of images, or of folders of images."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of train_dir."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset to train on."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})


def main(argv=None) -> None:
    """Parse, check everything, pre-train, save."""
    parser = cli.Parser((ModelArguments, FrancaSettings, DataArguments, FrancaTrainingArguments))
    with runs.training_run(parser, argv, check) as run:
        from run_scripts.training import franca

        args = run.args
        trainer = franca.make_trainer(*run.arguments)
        run.begin(trainer)
        run.train()
        backbone = os.path.join(args.output_dir, "backbone")
        with run.saving():
            trainer.save_model()
            if args.should_save:
                trainer.model.teacher.save_backbone(backbone)
        if trainer.is_world_process_zero():
            with cli.writing(args.output_dir):
                trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
            print(f"\nMeasure it: python run_scripts/evaluate_franca.py --model_name_or_path {args.output_dir} ...")


def check(model_args: ModelArguments, settings: FrancaSettings, data_args: DataArguments) -> None:
    """ValueError for wrong input that shows without the libraries that the training needs."""
    cli.exactly_one(model_args, "model_name_or_path", "backbone_config", "the backbone")
    cli.exactly_one(data_args, "train_dir", "dataset_name", "the images")
    if data_args.train_dir is not None and not os.path.isdir(data_args.train_dir):
        raise ValueError(f"train_dir: {data_args.train_dir} is not a folder")
    if model_args.model_name_or_path is not None:
        checks.check_model(model_args.model_name_or_path)


if __name__ == "__main__":
    main()
