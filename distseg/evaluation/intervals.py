"""Intervals by resampling: of means, and of differences of two methods over the same images."""

from collections.abc import Sequence

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


def grouped_interval(
    scores: np.ndarray, groups: Sequence[str], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean of scores (n,) over images and its 95 % percentile bootstrap interval over groups.

    Whole groups are resampled, for images of one patient or lesion are not independent (Davison and Hinkley 1997,
    §3.8); of groups of one image each this is the bootstrap over images. Raises ValueError for n = 0.
    """
    if not len(scores):
        raise ValueError("no images to score")
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(place, weights=scores), np.bincount(place)
    chosen = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    means = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.mean(scores)), float(low), float(high)
