"""The methods that are compared, and the budget that they share. Everything here loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run_scripts.shared import cli

if TYPE_CHECKING:
    from datasets import Dataset

    from modeling_2dmse import Size
    from run_scripts.finetune import ModelArguments
    from trainer import TwoDMSETrainingArguments

UNTRAINED, PROJECTIONS, REFINED, PCA = "untrained", "projections", "projections-refined", "pca"
GATES = "projections-gates"
SEPARATE, SAME_RECIPE = "separate", "separate-same-recipe"
PEER, PEER_ALL = "sentence-transformers-2d", "sentence-transformers-2d-all"
SMAE, BEST = "smae-starbucks", "best"
# The flags of finetune.py that make a method; they come after those of the shared recipe.
FLAGS = {
    SEPARATE: ("--objective", "separate", "--alignment", "none"),
    "matryoshka": ("--objective", "matryoshka", "--alignment", "none"),
    "2dmse": ("--objective", "2dmse", "--alignment", "feature_kl"),
    "starbucks-feature_kl": ("--objective", "starbucks", "--alignment", "feature_kl"),
    "starbucks-score_kl": ("--objective", "starbucks", "--alignment", "score_kl"),
    SMAE: ("--objective", "starbucks", "--alignment", "score_kl"),
}
# Without training: nothing, exit projections fitted to the full size (and refined, and with gates), or to each exit's
# own principal components.
WITHOUT_TRAINING = (UNTRAINED, PROJECTIONS, REFINED, GATES, PCA)
# A model for each size.
PER_SIZE = (SEPARATE, SAME_RECIPE)
METHODS = (*WITHOUT_TRAINING, *FLAGS, PEER, PEER_ALL, SAME_RECIPE, BEST)


@dataclass(frozen=True)
class Budget:
    """What all methods share: the recipes, the training data, and what is set for all of them."""

    recipe: str = field(
        default=str(cli.RECIPES / "minilm-nli.yaml"),
        metadata={"help": "Recipe of finetune.py that all methods share: backbone, ladder, batch, epochs, schedule. "
                  "Default: minilm-nli.yaml."},
    )  # fmt: skip
    best_recipe: str = field(
        default=str(cli.RECIPES / "minilm-best.yaml"),
        metadata={"help": "Recipe of finetune.py for `best` and `separate-same-recipe`. Default: minilm-best.yaml."},
    )
    pretrain_recipe: str = field(
        default=str(cli.RECIPES / "smae-quick.yaml"),
        metadata={"help": "Recipe of pretrain.py for SMAE. Default: smae-quick.yaml."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Rows (anchor, positive[, negative]) or (sentence1, sentence2, score)."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset with such columns instead."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration; the split is `train`."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Rows per run, drawn by its seed."})
    pretrain_file: str | None = field(
        default=None, metadata={"help": "Plain text for SMAE, if its recipe does not name a dataset."}
    )
    unlabeled_file: str | None = field(
        default=None,
        metadata={"help": "Texts without labels for `best` and `separate-same-recipe`, in a format that finetune.py "
                  "reads."},
    )  # fmt: skip
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of every method. Default: the recipes' value."}
    )
    loss_scale: float | None = field(
        default=None, metadata={"help": "Scale of every method's loss. Default: the recipes' value."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 mixed precision for all methods. Default: as the recipes and the machine decide."},
    )

    def arguments(self) -> tuple[ModelArguments, TwoDMSETrainingArguments]:
        """The model and the training arguments of the shared recipe."""
        from run_scripts import finetune
        from trainer import TwoDMSETrainingArguments

        parser = cli.Parser((finetune.ModelArguments, finetune.DataArguments, TwoDMSETrainingArguments))
        # The parser wants an output folder; nothing is written there.
        model, _, args = parser.parse([self.recipe, *self.flags, "--output_dir", "unused"])
        return model, args

    @property
    def precision(self) -> list[str]:
        """The precision as a flag of finetune.py and pretrain.py; no flag if it is left to the recipes."""
        return [] if self.bf16 is None else ["--bf16", str(self.bf16)]

    @property
    def flags(self) -> list[str]:
        """Flags of finetune.py that override what the recipes set."""
        epochs = [] if self.num_train_epochs is None else ["--num_train_epochs", str(self.num_train_epochs)]
        scale = [] if self.loss_scale is None else ["--loss_scale", str(self.loss_scale)]
        return [*self.precision, *epochs, *scale]

    @property
    def data_flags(self) -> list[str]:
        """Flags of finetune.py that name the training data."""
        names = ("train_file", "dataset_name", "dataset_config", "max_train_samples")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    def rows(self, seed: int) -> Dataset:
        """The rows that finetune.py draws with a seed."""
        from trainer.data import check_table
        from trainer.shared.tables import draw_rows, load_hub_dataset, read_table

        if self.train_file is not None:
            table = check_table(read_table(self.train_file), "train_file")
        else:
            table = load_hub_dataset(str(self.dataset_name), self.dataset_config, split="train")
            table = check_table(table, "dataset_name")
        return draw_rows(table, self.max_train_samples, seed)


@dataclass(frozen=True)
class Unit:
    """One method, or a separate model of one size: what a learning rate is chosen for."""

    method: str
    size: str | None = None

    def __str__(self) -> str:
        return self.method if self.size is None else f"{self.method}-{self.size}"


def units(methods: list[str], ladder: list[Size]) -> list[Unit]:
    """One unit per method, and one per size for the methods with a model for each size."""
    return [
        unit
        for method in methods
        for unit in ([Unit(method, str(size)) for size in ladder] if method in PER_SIZE else [Unit(method)])
    ]
