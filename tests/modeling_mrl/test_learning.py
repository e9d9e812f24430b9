"""What nested heads learn on scikit-learn's digits, beside heads that are trained alone."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from modeling_mrl import MatryoshkaHead, choose_sizes, confidences, fit_thresholds, nested_loss

DIMS = [2, 4, 8, 16, 32, 64]


def parts(seed: int):
    """Images and labels to train on (900), to choose and fit on (297) and to test on (600), drawn anew by each seed."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    return [(images[rows], labels[rows]) for rows in order.split([900, 297, 600])]
