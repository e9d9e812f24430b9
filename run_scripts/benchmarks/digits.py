"""The effect of nesting: kNN accuracy of prefixes on scikit-learn's digits, against flat and projection heads."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_franca import FrancaConfig, FrancaForPretraining
from trainer.franca.evaluation import knn_by_size
from trainer.franca.trainer import FrancaTrainer, FrancaTrainingArguments

WIDTH = 64
SIZES = (4, 8, 16, 32, 64)
HEADS = {
    "slice": {"nesting_sizes": SIZES},
    "flat": {"nesting_sizes": (WIDTH,)},
    "projection": {"nesting_sizes": SIZES, "head_input": "projection"},
}
BATCH = 256
# The same for all three heads.
SETTINGS = {
    "num_prototypes": 640,
    "head_num_layers": 2,
    "head_hidden_size": 128,
    "head_bottleneck_size": 32,
    "momentum": 0.99,
    "patch_weight": 0.0,
    "koleo_weight": 0.1,
}
LEARNING_RATE = 3e-3


class DigitEncoderConfig(PreTrainedConfig):
    """Configuration of a perceptron on pictures of 8x8 pixels."""

    model_type = "digit-encoder"

    def __init__(self, hidden_size=WIDTH, inner_size=256, image_size=8, **kwargs):
        self.hidden_size, self.inner_size = hidden_size, inner_size
        self.image_size = self.patch_size = image_size
        super().__init__(**kwargs)


class DigitEncoder(PreTrainedModel):
    """A perceptron that returns one token and no patches."""

    config_class = DigitEncoderConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DigitEncoderConfig):
        super().__init__(config)
        inner = config.inner_size
        self.layers = nn.Sequential(
            nn.Linear(config.image_size**2, inner),
            nn.GELU(),
            nn.Linear(inner, inner),
            nn.GELU(),
            nn.Linear(inner, config.hidden_size),
            nn.LayerNorm(config.hidden_size),
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        """From (batch, 1, 8, 8) pictures to (batch, 1, D) states."""
        return BaseModelOutput(last_hidden_state=self.layers(pixel_values.flatten(1))[:, None])


AutoConfig.register(DigitEncoderConfig.model_type, DigitEncoderConfig, exist_ok=True)
AutoModel.register(DigitEncoderConfig, DigitEncoder, exist_ok=True)


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 1, 8, 8) with values from 0 to 1, and labels, to train on and to classify."""

    train: torch.Tensor
    train_labels: np.ndarray
    test: torch.Tensor
    test_labels: np.ndarray


def load_parts(validation: bool = False) -> Digits:
    """1,347 digits to train on and 450 to test; with `validation`, the former are split into 1,010 and 337."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pictures, labels = load_digits(return_X_y=True)
    pictures = (pictures / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, train_labels, test_labels = train_test_split(pictures, labels, random_state=0, stratify=labels)
    if validation:
        train, test, train_labels, test_labels = train_test_split(
            train, train_labels, random_state=1, stratify=train_labels
        )
    return Digits(torch.from_numpy(train), train_labels, torch.from_numpy(test), test_labels)


class DigitViews:
    """Two global views of each digit, turned, scaled, shifted and noisy, and two local ones with more of it hidden.

    As with [`trainer.franca.crops.MultiCrop`], `epoch` is set from outside. The views depend only on epoch, seed and
    batch.
    """

    turn, scale, shift, noise = 0.3, 0.2, 1.0, 0.1
    hidden = (0.1, 0.1, 0.3, 0.3)

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = 0

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        key = [self.seed, self.epoch, examples[0]["index"]]
        generator = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**63)))
        pictures = torch.stack([example["pixels"] for example in examples])
        views = [self._view(pictures, share, generator) for share in self.hidden]
        return {"global_crops": torch.stack(views[:2], dim=1), "local_crops": torch.stack(views[2:], dim=1)}

    def _view(self, pictures: torch.Tensor, hidden: float, generator: torch.Generator) -> torch.Tensor:
        def draw(width: float) -> torch.Tensor:
            return (torch.rand(len(pictures), generator=generator) * 2 - 1) * width

        angle, zoom = draw(self.turn), 1 / (1 + draw(self.scale))
        rows = [(zoom * angle.cos(), -zoom * angle.sin()), (zoom * angle.sin(), zoom * angle.cos())]
        # In the units of affine_grid, the picture is 2 wide.
        moves = [draw(self.shift) * 2 / pictures.shape[-1] for _ in rows]
        matrix = torch.stack([torch.stack([*row, move], 1) for row, move in zip(rows, moves, strict=True)], 1)
        grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
        view = F.grid_sample(pictures, grid, align_corners=False)
        view = view + self.noise * torch.randn(view.shape, generator=generator)
        return view * (torch.rand(view.shape, generator=generator) >= hidden)


def train_digits(head: str, seed: int, digits: Digits, steps: int) -> FrancaForPretraining:
    """Train one kind of head (a key of HEADS) on the digits, without labels."""
    torch.manual_seed(seed)
    model = FrancaForPretraining(FrancaConfig(DigitEncoderConfig(), **SETTINGS, **HEADS[head]))
    rows = [{"pixels": pixels, "index": index} for index, pixels in enumerate(digits.train)]
    with tempfile.TemporaryDirectory() as folder:
        args = FrancaTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        FrancaTrainer(model=model, args=args, train_dataset=rows, data_collator=DigitViews(seed)).train()
    return model


def score_digits(model: FrancaForPretraining, digits: Digits) -> dict[str, float]:
    """kNN accuracy of every size, as {"4": accuracy}."""
    train, test = model.encode(digits.train), model.encode(digits.test)
    return knn_by_size(SIZES, train, digits.train_labels, test, digits.test_labels)


def mean_scores(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over seeds at each size, and `4 and 8`, the mean of these two sizes."""
    means = {size: math.fsum(run[size] for run in runs) / len(runs) for size in runs[0]}
    return means | {"4 and 8": (means["4"] + means["8"]) / 2}
