"""What nested heads learn on scikit-learn's digits, compared with heads that are trained separately."""

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from modeling_mrl import MatryoshkaHead, choose_sizes, confidences, fit_thresholds, nested_loss

DIMS = [2, 4, 8, 16, 32, 64]
# Chosen among 18 settings by their scores on the second part (five folds of it for the cascade).
STEPS, RATE, NOISE = 600, 3e-2, 0.2
WEIGHTS = {2: 2.0, 4: 2.0}


def parts(seed: int):
    """Images and labels to train on (800), to choose settings and fit the cascade on (500), to test on (497)."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    return [(images[rows], labels[rows]) for rows in order.split([800, 500, 497])]


def learn(seed: int, dims: list[int], images, labels) -> Callable[[torch.Tensor], torch.Tensor]:
    """64 features and heads on their first m, trained together; from images to (sizes, images, classes) logits.

    In float64, because in float32 different CPUs round differently and end with models that differ by a point.
    """
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 64))
    head = MatryoshkaHead(dims, 10).double()
    features.double()
    parameters = [*features.parameters(), *head.parameters()]
    weights = [WEIGHTS.get(dim, 1.0) for dim in dims]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (128,))
        noisy = images[rows] + NOISE * torch.randn(128, 64, dtype=torch.float64)
        optimizer.zero_grad()
        nested_loss(head(features(noisy)), labels[rows], weights)[0].backward()
        optimizer.step()
        schedule.step()
    features.eval()

    @torch.no_grad()
    def logits(images):
        return head(features(images))

    return logits


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    return (logits.argmax(dim=-1) == labels).double().mean(dim=-1).tolist()


def cascade(thresholds, logits, labels) -> tuple[float, float]:
    """Accuracy and expected dim."""
    confidence, predicted = confidences(logits)
    sizes = choose_sizes(confidence, thresholds)
    hits = predicted[sizes, torch.arange(len(labels))] == labels
    return hits.double().mean().item(), torch.tensor(DIMS)[sizes].double().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits(seed):
    """MRL's claims: each prefix is as good as a model trained only for it, and a cascade is nearly as good as the
    largest size with a fraction of its dimensions. Settings were chosen on the second part, never on the third."""
    train, held, test = parts(seed)
    nested = learn(seed, DIMS, *train)
    together = accuracy(nested(test[0]), test[1])
    alone = [accuracy(learn(seed, [dim], *train)(test[0]), test[1])[0] for dim in DIMS[1:]]
    score, expected_dim = cascade(fit_thresholds(nested(held[0]), held[1]), nested(test[0]), test[1])
    print(f"\nseed {seed}: nested {together}, alone from 4 up {alone}, cascade {score} at {expected_dim} dims")
    assert min(alone) > 0.9
    assert all(shared >= single - 0.015 for shared, single in zip(together[1:], alone, strict=True))
    assert score >= together[-1] - 0.012
    assert expected_dim < 6
    # Two dimensions are not enough, so the cascade has something to do.
    assert together[0] < score
