"""The cascade against a loop over samples, and its thresholds against every possible threshold."""

import pytest
import torch

from modeling_mrl import choose_sizes, confidences, fit_thresholds


def random_logits(sizes=4, samples=60, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(sizes, samples, classes, generator=generator, dtype=torch.float64)
    # Larger sizes know more.
    return logits + torch.arange(sizes)[:, None, None] * 0.7 * torch.nn.functional.one_hot(labels, classes), labels


def loop(logits, thresholds):
    """Sample by sample, size by size."""
    stopped = []
    for sample in range(logits.shape[1]):
        for size in range(logits.shape[0]):
            values = logits[size, sample].exp()
            confidence = (values / values.sum()).max().item()
            if size == logits.shape[0] - 1 or confidence > thresholds[size]:
                stopped.append((size, int(values.argmax()), confidence))
                break
    return stopped


@pytest.mark.parametrize("thresholds", [[0.5, 0.6, 0.7], [0.9, 0.4, 0.99], [0.7, 0.7, 0.7]])
def test_vectorised_equals_the_loop(thresholds):
    logits, _ = random_logits()
    confidence, labels = confidences(logits)
    sizes = choose_sizes(confidence, thresholds)
    expected = loop(logits, thresholds)
    assert len(set(sizes.tolist())) > 1
    assert sizes.tolist() == [size for size, _, _ in expected]
    rows = torch.arange(len(sizes))
    assert labels[sizes, rows].tolist() == [label for _, label, _ in expected]
    assert confidence[sizes, rows].tolist() == pytest.approx([value for _, _, value in expected])


def test_thresholds_above_one_and_below_zero():
    logits, _ = random_logits()
    logits[0, 0] = torch.tensor([1e4, 0, 0])  # confidence 1, in float64 too
    confidence, _ = confidences(logits)
    assert confidence.max() == 1
    assert set(choose_sizes(confidence, [1.01] * 3).tolist()) == {3}
    assert set(choose_sizes(confidence, [-0.01] * 3).tolist()) == {0}


@pytest.mark.parametrize("seed", range(5))
def test_a_fitted_threshold_is_the_smallest_of_the_best(seed):
    logits, labels = random_logits(seed=seed)
    logits[:, :10] = logits[:, 10:20]  # equal confidences on both sides of a threshold
    labels[:10] = (labels[10:20] + torch.arange(10) % 2) % 3
    confidence, predicted = confidences(logits)
    thresholds = fit_thresholds(logits, labels)
    assert len(thresholds) == 3

    def accuracy(pair, threshold):
        hits = [
            (predicted[pair, i] if confidence[pair, i] > threshold else predicted[pair + 1, i]).item()
            == labels[i].item()
            for i in range(len(labels))
        ]
        return sum(hits)

    for pair, threshold in enumerate(thresholds):
        levels = confidence[pair].tolist()
        # Between, at and beyond all levels: every accuracy that a threshold can have.
        tried = sorted({0.0, 1.0, *levels, *(level - 1e-9 for level in levels)})
        best = max(accuracy(pair, value) for value in tried)
        assert accuracy(pair, threshold) == best
        assert all(accuracy(pair, value) < best for value in tried if value < threshold)
    assert max(thresholds) > 0


def test_a_smaller_size_that_is_always_right_is_always_taken():
    logits, labels = random_logits(sizes=2)
    logits[0] = 5.0 * torch.nn.functional.one_hot(labels, 3)
    assert fit_thresholds(logits, labels) == [0.0]
    logits, labels = random_logits(sizes=2)
    logits[0] = -5.0 * torch.nn.functional.one_hot(labels, 3)
    logits[1] = 5.0 * torch.nn.functional.one_hot(labels, 3)
    (threshold,) = fit_thresholds(logits, labels)
    confidence, _ = confidences(logits)
    assert set(choose_sizes(confidence, [threshold]).tolist()) == {1}


def test_one_class_or_nothing_to_fit_on():
    logits, _ = random_logits(sizes=2, samples=6)
    with pytest.raises(ValueError, match="dataset: all 6 rows are of class 2; a cascade is fitted on held-out data"):
        fit_thresholds(logits, torch.full((6,), 2))
    with pytest.raises(ValueError, match="dataset: there are no rows"):
        fit_thresholds(logits[:, :0], torch.empty(0, dtype=torch.long))
