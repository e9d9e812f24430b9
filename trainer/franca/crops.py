"""Several views of each image for self-distillation: crops, colors and patch masks."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from modeling_franca import CyclicMask

# Probabilities and strengths of DINO (Caron et al. 2021, appendix A), which are those of BYOL.
FLIP, JITTER, GREY = 0.5, 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION = 0.4, 0.4, 0.2
# Probabilities of blur and of solarization for the first global crop, the second, and local crops.
BLUR, SOLARIZE = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)
ASPECT = 3 / 4


class MultiCrop:
    """Makes a batch for `FrancaForPretraining` from examples `{"image": PIL image, "index": int}`.

    All random choices are a function of the seed, the epoch and the index of the image. They are the same after a
    resume, in a worker process, and in any process of a run.

    Args:
        patch_size: height and width of a patch in pixels.
        mean: mean of each channel, from 0 to 1, as in the image processor.
        std: standard deviation of each channel, as in the image processor.
        global_crops: number of global crops.
        local_crops: number of local crops.
        global_size: edge of a global crop in pixels.
        local_size: edge of a local crop in pixels.
        global_scale: lowest and highest fraction of the image's area that a global crop takes.
        local_scale: lowest and highest fraction of the image's area that a local crop takes.
        mask_ratio: fraction of the patches that are hidden in a masked crop.
        mask_probability: fraction of the global crops that are masked; 0 for no masks.
        seed: seed of the run.
        max_mask_ratio: if given, the fraction of each masked crop is drawn uniformly between `mask_ratio` and this.

    Attributes:
        epoch: set by a callback of the trainer.

    Raises:
        ValueError: a crop size is not a multiple of the patch size, or a number is out of range.
    """

    def __init__(
        self,
        patch_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        global_crops: int = 2,
        local_crops: int = 8,
        global_size: int = 224,
        local_size: int = 96,
        global_scale: Sequence[float] = (0.32, 1.0),
        local_scale: Sequence[float] = (0.05, 0.32),
        mask_ratio: float = 0.5,
        mask_probability: float = 0.5,
        seed: int = 0,
        max_mask_ratio: float | None = None,
    ):
        for name, size, count in (
            ("global_crop_size", global_size, global_crops),
            ("local_crop_size", local_size, local_crops),
        ):
            if count and (size < 1 or size % patch_size[0] or size % patch_size[1]):
                raise ValueError(
                    f"{name}: {size} is not allowed; use a multiple of the patch size {patch_size[0]}x{patch_size[1]}"
                )
        self.grid = (global_size // patch_size[0], global_size // patch_size[1])
        self.mask = CyclicMask(*self.grid, mask_ratio)
        self.mask_ratios = None if max_mask_ratio is None else (mask_ratio, max_mask_ratio)
        self.mask_probability = mask_probability
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.views = [(global_size, tuple(global_scale), min(index, 1)) for index in range(global_crops)]
        self.views += [(local_size, tuple(local_scale), 2)] * local_crops
        self.global_crops = global_crops
        self.seed = seed
        self.epoch = 0

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        crops, masks = [], []
        for example in examples:
            rng = np.random.default_rng([self.seed, self.epoch, example["index"]])
            image = example["image"].convert("RGB")
            crops.append([self._view(image, *view, rng) for view in self.views])
            masks.append([self._mask(rng) for _ in range(self.global_crops)])
        batch = {"global_crops": self._stack(crop[: self.global_crops] for crop in crops)}
        if len(self.views) > self.global_crops:
            batch["local_crops"] = self._stack(crop[self.global_crops :] for crop in crops)
        if self.mask_probability:
            batch["mask"] = torch.from_numpy(np.array(masks)).flatten(2)
            batch["masked"] = batch["mask"].flatten().nonzero().squeeze(1)
        return batch

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        maker = self.mask
        if self.mask_ratios is not None:
            maker = CyclicMask(*self.grid, rng.uniform(*self.mask_ratios))
        mask = maker(rng)
        return mask if rng.random() < self.mask_probability else np.zeros_like(mask)

    def _view(self, image: Image.Image, size: int, scale: tuple, kind: int, rng: np.random.Generator) -> np.ndarray:
        """One crop as a (size, size, 3) array of bytes."""
        box = draw_box(image.size, scale, rng)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < FLIP:
            crop = ImageOps.mirror(crop)
        if rng.random() < JITTER:
            crop = _jitter(crop, rng)
        if rng.random() < GREY:
            crop = ImageOps.grayscale(crop).convert("RGB")
        if rng.random() < BLUR[kind]:
            # DINO's radius is for crops of 224 pixels.
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * size / 224))
        if rng.random() < SOLARIZE[kind]:
            crop = ImageOps.solarize(crop)
        return np.asarray(crop)

    def _stack(self, crops) -> torch.Tensor:
        """(batch, crops, 3, size, size), normalized."""
        pixels = torch.from_numpy(np.array(list(crops))).permute(0, 1, 4, 2, 3)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def _jitter(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
    changes = [
        (ImageEnhance.Brightness, BRIGHTNESS),
        (ImageEnhance.Contrast, CONTRAST),
        (ImageEnhance.Color, SATURATION),
    ]
    for index in rng.permutation(len(changes)):
        change, strength = changes[index]
        crop = change(crop).enhance(rng.uniform(1 - strength, 1 + strength))
    return crop


def draw_box(
    size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw a random crop.

    Its fraction of the image's area is uniform in `scale`, and its aspect ratio is log-uniform from 3/4 to 4/3, or less
    if the image is too narrow for it.

    Args:
        size: width and height of the image.
        scale: lowest and highest fraction of the area.
        rng: the random generator.

    Returns:
        left, top, right and bottom of the crop.
    """
    width, height = size
    area = rng.uniform(*scale) * width * height
    aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
    box_width, box_height = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return left, top, left + box_width, top + box_height
