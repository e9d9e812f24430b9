"""Evaluation of image embeddings: nearest neighbors at every size, and how well patches predict their position."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from modeling_franca import FrancaModel, RasaProjector, grid_positions
from modeling_franca.images import batches
from modeling_franca.running import execution_device

# Test images whose similarities to all training images are in memory at once.
_ROWS = 1024


def knn_accuracy(
    train: np.ndarray,
    train_labels: Sequence[int],
    test: np.ndarray,
    test_labels: Sequence[int],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of a weighted vote of the k nearest training images (Wu et al. 2018; DINO's evaluation).

    Each neighbor votes for its label with the weight exp(cosine / temperature).

    Args:
        train: (n, D) embeddings of the training images, of any length.
        train_labels: (n,) whole numbers from 0.
        test: (m, D) embeddings of the test images, of any length.
        test_labels: (m,) whole numbers from 0.
        k: number of neighbors.
        temperature: temperature of the weights.

    Returns:
        the accuracy, from 0 to 1.

    Examples:
        >>> knn_accuracy(np.eye(2), [0, 1], np.array([[3.0, 1.0], [1.0, 2.0]]), [0, 0], k=1)
        0.5
    """
    pool, labels = F.normalize(torch.as_tensor(train).float(), dim=1), torch.as_tensor(np.asarray(train_labels))
    queries, truth = F.normalize(torch.as_tensor(test).float(), dim=1), torch.as_tensor(np.asarray(test_labels))
    classes, hits = int(labels.max()) + 1, 0
    for start in range(0, len(queries), _ROWS):
        similarity, nearest = (queries[start : start + _ROWS] @ pool.T).topk(min(k, len(pool)), dim=1)
        votes = torch.zeros(len(nearest), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        hits += int((votes.argmax(dim=1) == truth[start : start + _ROWS]).sum())
    return hits / len(queries)


def knn_by_size(
    sizes: Sequence[int], train: np.ndarray, train_labels, test: np.ndarray, test_labels, k: int = 20
) -> dict[str, float]:
    """`knn_accuracy` with the first m dimensions, for each size m: `{"m": accuracy}`."""
    return {str(m): knn_accuracy(train[:, :m], train_labels, test[:, :m], test_labels, k) for m in sizes}


@torch.no_grad()
def patch_features(model: FrancaModel, images: Sequence, batch_size: int = 64) -> torch.Tensor:
    """The patch tokens (n, patches, D) of images, which the image processor resizes to the same size."""
    parts = batches(images, batch_size, model.image_processor)
    device = execution_device(model)
    return torch.cat([model(pixels.to(device)).patch_tokens.float().cpu() for pixels in parts])


def patch_grid(model: FrancaModel, images: Sequence) -> tuple[int, int]:
    """The number of rows and columns of patches in an image after the image processor."""
    height, width = next(batches(images, 1, model.image_processor)).shape[-2:]
    return height // model.config.patch_size[0], width // model.config.patch_size[1]


def position_r2(train: torch.Tensor, test: torch.Tensor, positions: torch.Tensor, ridge: float = 1e-6) -> float:
    """How well a linear predictor finds the row and column of a patch: R^2 on the test images.

    The predictor is fitted on the training images by least squares. Always predicting the mean position gives 0; a
    worse predictor is below 0.

    Args:
        train: (images, patches, D) patch tokens of the training images.
        test: (images, patches, D) patch tokens of the test images.
        positions: (patches, 2), the row and column of each patch.
        ridge: added to the diagonal of the covariance, as a fraction of its mean, because some directions may be empty.

    Returns:
        R^2.
    """
    inputs, targets = train.flatten(0, 1).double(), positions.double().repeat(len(train), 1)
    mean, middle = inputs.mean(dim=0), targets.mean(dim=0)
    inputs = inputs - mean
    covariance = inputs.T @ inputs
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, inputs.T @ (targets - middle))
    truth = positions.double().repeat(len(test), 1) - middle
    errors = (test.flatten(0, 1).double() - mean) @ weight - truth
    return 1 - (errors.square().sum() / truth.square().sum()).item()


def measure_position(
    model: FrancaModel, train: Sequence, test: Sequence, method: str, iterations: int, batch_size: int = 64
) -> tuple[RasaProjector, dict[str, float]]:
    """Fit RASA on training images, and evaluate `position_r2` before and after its projection.

    Args:
        model: the model.
        train: the training images.
        test: the test images.
        method: the method of `RasaProjector.fit`.
        iterations: the iterations of `RasaProjector.fit`.
        batch_size: images per batch.

    Returns:
        the projector, and R^2 on the test images, `before` and `after` the projection.
    """
    train_patches = patch_features(model, train, batch_size)
    test_patches = patch_features(model, test, batch_size)
    positions = grid_positions(*patch_grid(model, train))
    projector = RasaProjector.fit(train_patches, positions, method, iterations)
    before = position_r2(train_patches, test_patches, positions)
    after = position_r2(projector(train_patches), projector(test_patches), positions)
    return projector, {"before": before, "after": after}


def pca_maps(features: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of patch tokens, as colors.

    Args:
        features: (images, patches, D).
        grid: the number of rows and columns of patches.

    Returns:
        (images, rows, columns, 3), where each component is scaled to the range from 0 to 1 over all images.
    """
    flat = features.flatten(0, 1).double()
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat.T @ flat)
    colors = flat @ directions[:3].T
    low, high = colors.amin(dim=0), colors.amax(dim=0)
    return ((colors - low) / (high - low).clamp_min(1e-12)).view(len(features), *grid, 3).numpy()
