"""Whether probabilities come true: the expected calibration error and its bins (Guo et al. 2017, arXiv 1706.04599)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BINS = 15


def calibration_bins(confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(BINS, 3): of pixels with a confidence in each of BINS equal parts of [0, 1] the number, the sum of confidences
    and the number of right ones.

    `confidence` is the probability of the class that was predicted; both are of any one shape. An upper end belongs to
    its bin.
    """
    place = np.clip(np.ceil(confidence.ravel() * BINS).astype(np.int64) - 1, 0, BINS - 1)
    columns: Sequence[NDArray | None] = (None, confidence.ravel().astype(np.float64), right.ravel().astype(np.float64))
    return np.stack([np.bincount(place, weights=each, minlength=BINS) for each in columns], axis=1).astype(np.float64)


def expected_calibration_error(bins: NDArray[np.float64]) -> float:
    """Mean over pixels of |share of right ones − mean confidence| of their bin; NaN without pixels."""
    total = bins[:, 0].sum()
    return float(np.abs(bins[:, 2] - bins[:, 1]).sum() / total) if total else float("nan")
