"""Several views of each picture for self-distillation: crops, colours, masks of patches."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from modeling_franca import CyclicMask

# Strengths and probabilities of DINO (Caron et al. 2021, appendix A), which are BYOL's.
FLIP, JITTER, GREY = 0.5, 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION = 0.4, 0.4, 0.2
# Probabilities of blur and of solarising for the first and second global crop, and for local crops.
BLUR, SOLARIZE = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)
ASPECT = 3 / 4


class MultiCrop:
    """
    Makes the batch of [`FrancaForPretraining`] from pictures.

    All random choices are a function of (seed, epoch, the picture's index): the same after a resume, in a worker, and
    in whichever process the picture comes up.

    Args:
        patch_size: height and width of a patch in pixels.
        mean, std: of each channel, from 0 to 1, as the image processor has them.
        global_crops, local_crops: how many of each.
        global_size, local_size: their edges in pixels.
        global_scale, local_scale: lowest and highest share of the picture's area that a crop takes.
        mask_ratio: share of a masked crop's patches that is hidden.
        mask_probability: share of the global crops that is masked; 0 gives no masks.
        seed: of the run.

    `epoch` is set from outside. Examples are {"image": PIL picture, "index": int}.

    Raises:
        ValueError: a size that the patches do not divide, or numbers out of range.
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
    ):
        for name, size, count in (
            ("global_crop_size", global_size, global_crops),
            ("local_crop_size", local_size, local_crops),
        ):
            if count and (size < 1 or size % patch_size[0] or size % patch_size[1]):
                raise ValueError(
                    f"{name}: {size} is not allowed; use a multiple of the patch size {patch_size[0]}x{patch_size[1]}"
                )
        self.mask = CyclicMask(global_size // patch_size[0], global_size // patch_size[1], mask_ratio)
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
            picture = example["image"].convert("RGB")
            crops.append([self._view(picture, *view, rng) for view in self.views])
            masks.append([self._mask(rng) for _ in range(self.global_crops)])
        batch = {"global_crops": self._stack(crop[: self.global_crops] for crop in crops)}
        if len(self.views) > self.global_crops:
            batch["local_crops"] = self._stack(crop[self.global_crops :] for crop in crops)
        if self.mask_probability:
            batch["mask"] = torch.from_numpy(np.array(masks)).flatten(2)
        return batch

    def _mask(self, rng: np.random.Generator) -> np.ndarray:
        mask = self.mask(rng)
        return mask if rng.random() < self.mask_probability else np.zeros_like(mask)

    def _view(self, picture: Image.Image, size: int, scale: tuple, kind: int, rng: np.random.Generator) -> np.ndarray:
        """One crop as a (size, size, 3) array of bytes."""
        box = draw_box(picture.size, scale, rng)
        crop = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < FLIP:
            crop = ImageOps.mirror(crop)
        if rng.random() < JITTER:
            crop = _jitter(crop, rng)
        if rng.random() < GREY:
            crop = ImageOps.grayscale(crop).convert("RGB")
        if rng.random() < BLUR[kind]:
            # DINO's radius is meant for crops of 224 pixels.
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * size / 224))
        if rng.random() < SOLARIZE[kind]:
            crop = ImageOps.solarize(crop)
        return np.asarray(crop)

    def _stack(self, crops) -> torch.Tensor:
        """(batch, crops, 3, size, size), normalised."""
        pixels = torch.from_numpy(np.array(list(crops))).permute(0, 1, 4, 2, 3)
        return (pixels.float() / 255 - self.mean) / self.std


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
    """(left, top, right, bottom) of a random crop, whose share of the area is uniform in `scale` and whose aspect is
    log-uniform from 3/4 to 4/3, less where the picture is too narrow for it."""
    width, height = size
    area = rng.uniform(*scale) * width * height
    aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
    box_width, box_height = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return left, top, left + box_width, top + box_height
