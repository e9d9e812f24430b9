"""Evaluate picture models at every nesting size, and their patches before and after RASA:
`python run_scripts/evaluate_franca.py --model_name_or_path SLICE FLAT PROJECTION --train_dir D --test_dir D ...`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import checks, cli, remote_code

if TYPE_CHECKING:
    from datasets import Dataset

    from modeling_franca import FrancaModel, RasaProjector

RANDOM = "random"


@dataclass
class EvaluationArguments:
    """What is evaluated on what."""

    model_name_or_path: list[str] = field(
        metadata={"help": "Folders or Hub names: outputs of pretrain_franca.py, or any vision transformers. Each is a "
                  "column, named after its folder."},
    )  # fmt: skip
    output_dir: str = field(metadata={"help": "Folder for results.json and pca.png."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Pictures in a folder per class, for neighbours and RASA."}
    )
    test_dir: str | None = field(default=None, metadata={"help": "Pictures in such folders that are classified."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of the two folders."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub dataset with the neighbours."})
    test_split: str = field(default="test", metadata={"help": "Split of the Hub dataset that is classified."})
    image_column: str = field(default="image", metadata={"help": "Column of the Hub dataset with the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of the Hub dataset with the classes."})
    sizes: list[int] | None = field(
        default=None, metadata={"help": "Dimensions that are measured. Default: the models' nesting sizes."}
    )
    k: int = field(default=20, metadata={"help": "Number of neighbours that vote."})
    random_init: bool = field(
        default=False, metadata={"help": "Add a column for the first model's architecture with random weights."}
    )
    rasa_method: str = field(
        default="covariance", metadata={"help": f"How RASA finds position: {', '.join(checks.RASA_METHODS)}."}
    )
    rasa_iterations: int = field(default=1, metadata={"help": "RASA iterations; each removes two directions."})
    rasa_images: int = field(
        default=500, metadata={"help": "Pictures for RASA, of the neighbours and of the classified; 0 for no RASA."}
    )
    save_rasa: bool = field(
        default=False, metadata={"help": "Save the first model with RASA folded in, to OUTPUT_DIR/rasa."}
    )
    batch_size: int = field(default=64, metadata={"help": "Pictures per batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the random weights and of RASA's pictures."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of an earlier evaluation."})
    trust_remote_code: bool = remote_code.trust_flag()


def main(argv=None) -> None:
    """Parse, load, evaluate, write."""
    with cli.user_errors():
        (args,) = cli.Parser((EvaluationArguments,)).parse(argv)
        check(args)

        from run_scripts.shared import output
        from trainer.franca.evaluation import knn_by_size

        train, test = _read(args, "train"), _read(args, "test")
        if train.features["label"] != test.features["label"]:
            raise ValueError("test_dir: its classes are not those of train_dir")
        models = {_name(path): _load(path, args.trust_remote_code) for path in args.model_name_or_path}
        sizes = _choose_sizes(args.sizes, list(models.values()))
        if args.random_init:
            models[RANDOM] = _random_twin(next(iter(models.values())), args.seed)
        os.makedirs(args.output_dir, exist_ok=True)
    results = {"n_train": len(train), "n_test": len(test), "k": args.k, "knn": {}}
    for name, model in models.items():
        with cli.reading_pictures():
            encoded = [model.encode(table["image"], batch_size=args.batch_size) for table in (train, test)]
        results["knn"][name] = knn_by_size(sizes, encoded[0], train["label"], encoded[1], test["label"], args.k)
    print(f"kNN accuracy, k = {args.k}:\n\n{output.score_table(results['knn'], sizes, 'size')}")
    with cli.writing(args.output_dir):
        if args.rasa_images:
            results |= _rasa(args, models, train, test)
        output.write_json(os.path.join(args.output_dir, "results.json"), results)
    print(f"\nwritten to {args.output_dir}")


def check(args: EvaluationArguments) -> None:
    """ValueError for a flag that is not allowed."""
    names = list(map(_name, args.model_name_or_path))
    if len(set(names)) < len(names) or RANDOM in names:
        raise ValueError(f"model_name_or_path: {', '.join(names)} must differ from each other and from {RANDOM}")
    for name, lowest in (("k", 1), ("batch_size", 1), ("rasa_iterations", 1), ("rasa_images", 0)):
        checks.check_at_least(name, getattr(args, name), lowest)
    checks.check_seeds([args.seed], "seed")
    checks.check_choice("rasa_method", args.rasa_method, checks.RASA_METHODS)
    if args.save_rasa and not args.rasa_images:
        raise ValueError("save_rasa: there is nothing to fold in with --rasa_images 0")
    checks.check_no_results(args.output_dir, args.overwrite)
    for name in ("train_dir", "test_dir"):
        cli.exactly_one(args, name, "dataset_name", "the images")
        folder = getattr(args, name)
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(f"{name}: {folder} is not a folder")
    for path in args.model_name_or_path:
        checks.check_model(path)


def _read(args: EvaluationArguments, role: str) -> Dataset:
    from run_scripts.shared.pictures import read_pictures

    return read_pictures(
        role,
        getattr(args, f"{role}_dir"),
        args.dataset_name,
        args.dataset_config,
        getattr(args, f"{role}_split"),
        args.image_column,
        args.label_column,
    )


def _name(path: str) -> str:
    return os.path.basename(path.rstrip(os.sep))


def _load(path: str, trust_remote_code: bool) -> FrancaModel:
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor

    from modeling_2dmse.loading import check_weights
    from modeling_franca import FrancaConfig, FrancaModel
    from run_scripts.shared import models

    path = models.resolve_model(path)
    trust = {"trust_remote_code": trust_remote_code}
    with remote_code.named(path):
        is_ours = models.read_config(path, **trust).model_type == FrancaConfig.model_type
        model = FrancaModel.from_pretrained(path, **trust) if is_ours else FrancaModel.from_backbone(path, **trust)
        check_weights(model, path)
        model.image_processor = AutoImageProcessor.from_pretrained(path, **trust)
        if not np.isfinite(model.encode([Image.new("RGB", (64, 64), "grey")])).all():
            raise ValueError("its embeddings are not finite")
    return models.to_device(model).eval()


def _choose_sizes(sizes: list[int] | None, models: Sequence[FrancaModel]) -> list[int]:
    chosen = sorted(set(sizes or [size for model in models for size in model.config.nesting_sizes]))
    width = min(model.config.hidden_size for model in models)
    if chosen[0] < 1 or chosen[-1] > width:
        raise ValueError(f"sizes: {chosen} is not allowed; use whole numbers from 1 to {width}")
    return chosen


def _random_twin(model: FrancaModel, seed: int) -> FrancaModel:
    from transformers import set_seed

    from modeling_franca import FrancaConfig, FrancaModel
    from run_scripts.shared import models

    set_seed(seed)
    config = FrancaConfig(model.config.backbone_config, nesting_sizes=model.config.nesting_sizes)
    twin = models.to_device(FrancaModel(config)).eval()
    twin.image_processor = model.image_processor
    return twin


def _rasa(args: EvaluationArguments, models: dict[str, FrancaModel], train: Dataset, test: Dataset) -> dict:
    """R^2 of position before and after RASA, as `results.json` has it; also prints it, draws it and saves the model."""
    from run_scripts.shared import output
    from trainer.franca.evaluation import measure_position

    few = [
        table.shuffle(seed=args.seed).select(range(min(args.rasa_images, len(table))))["image"][:]
        for table in (train, test)
    ]
    scores, first = {}, None
    for name, model in models.items():
        projector, scores[name] = measure_position(model, *few, args.rasa_method, args.rasa_iterations, args.batch_size)
        first = first or (model, projector)
    columns = {name: {when: score[when] for when in ("before", "after")} for name, score in scores.items()}
    print(f"\nR^2 of position, RASA by {args.rasa_method}:\n")
    print(output.score_table(columns, ["before", "after"], "RASA"))
    save_pca(*first, few[1][:6], os.path.join(args.output_dir, "pca.png"))
    if args.save_rasa:
        model, projector = first
        model.fold(projector).save_pretrained(os.path.join(args.output_dir, "rasa"))
    return {"rasa": {"method": args.rasa_method, "iterations": args.rasa_iterations}, "position_r2": scores}


def save_pca(model: FrancaModel, projector: RasaProjector, images: Sequence, path: str) -> None:
    """Draw each picture, and below it the principal components of its patches before and after RASA."""
    import matplotlib
    import numpy as np

    from run_scripts.shared import plots
    from trainer.franca.evaluation import patch_features, patch_grid, pca_maps

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    features, grid = patch_features(model, images), patch_grid(model, images)
    rows = {
        "picture": [np.asarray(image.convert("RGB")) for image in images],
        "PCA": pca_maps(features, grid),
        "PCA after RASA": pca_maps(projector(features), grid),
    }
    shape = {"figsize": (1.6 * len(images), 5), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(rows), len(images), **shape)
    for line, (title, maps) in zip(axes, rows.items(), strict=True):
        for axis, content in zip(line, maps, strict=True):
            axis.imshow(content)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    plots.save_picture(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    main()
