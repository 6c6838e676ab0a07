"""Paired comparisons of two methods over the same images."""

import numpy as np


def paired_difference(
    scores: np.ndarray, reference: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float, float]:
    """Mean of scores − reference (n,) over the same n images, its 95 % bootstrap interval, and a two-sided p.

    The images are resampled, both methods on the same ones (Efron and Tibshirani 1993, chapter 16): p is twice the
    smaller share of resamples on either side of 0, and at least 1 / (resamples + 1).
    """
    difference = np.asarray(scores, np.float64) - np.asarray(reference, np.float64)
    rng, means = np.random.default_rng(seed), []
    for size in (min(1000, resamples - first) for first in range(0, resamples, 1000)):
        means.append(difference[rng.integers(len(difference), size=(size, len(difference)))].mean(axis=1))
    drawn = np.concatenate(means)
    low, high = np.percentile(drawn, (2.5, 97.5))
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(difference.mean()), float(low), float(high), min(1.0, 2 * (tail + 1) / (resamples + 1))
