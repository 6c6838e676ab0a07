"""The annotator model: what a pixel's label most probably is, given what the network expects and what was drawn.

    log P(c | x, m) = log P(c | x) + log P(m | c) + const

P(c | x) is the network's calibrated probability (calibration.py) and m the bin of the pixel: the drawn class and the
signed distance to its contour (distances.py). P(m | c), how annotators err, is counted on the noisy stream, with what
is expected there in place of the truth (Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates
Using the EM Algorithm"; with a network for the prior, Bekker and Goldberger 2016, "Training Deep Neural-Networks Based
on Unreliable Labels"). Their model has one confusion matrix per annotator. Masks have distances too: annotators err by
where they put the contour, so background close to a drawn lesion says something else than background far from it. Under
masks that miss the rim, near background says little and far background much.

Masks (B, H, W) class ids, 255 = ignore; logits (B, C, H, W) of C classes, calibrated; bins (B, H, W) int64; counts
(C, bins) float64, rows the expected class. All are pure functions.
"""

import torch
from torch import Tensor

from distseg.labels.distances import drawn_class
from distseg.ops import valid_pixels

SMOOTHING = 1e-3
"""Additive smoothing: this share of each class's count is spread evenly over all bins, so that a bin which has not
occurred says nothing."""


def identity_prior(classes: int, device: torch.device) -> Tensor:
    """Counts of annotators who do not err: a bin occurs where the truth is what was drawn."""
    return torch.nn.functional.one_hot(drawn_class(classes, device), classes).T.double().contiguous()


def expected_counts(probabilities: Tensor, masks: Tensor, bins: Tensor, bin_count: int) -> Tensor:
    """How many of the valid pixels of each bin are expected to be of each class, Σ p_c [m]; p (B, C, H, W)."""
    valid = valid_pixels(masks)
    classes = torch.where(valid[:, None], probabilities, 0.0)
    # Bin by bin: a weighted bincount adds in no fixed order on a GPU, and a resumed run must give the same bits.
    columns = [(classes * (bins == index)[:, None]).sum((0, 2, 3), dtype=torch.float64) for index in range(bin_count)]
    return torch.stack(columns, 1)


def log_likelihood(counts: Tensor) -> Tensor:
    """log P(m | c), (C, bins), of counts of many pixels."""
    counts = counts + SMOOTHING * counts.sum(1, keepdim=True).clamp(min=1) / counts.shape[1]
    return (counts / counts.sum(1, keepdim=True)).log()


def posterior_logits(logits: Tensor, bins: Tensor, counts: Tensor) -> Tensor:
    """(B, C, H, W) whose softmax is P(c | x, m), from logits whose softmax is P(c | x)."""
    return logits + log_likelihood(counts).to(logits.dtype).T[bins].movedim(-1, 1)


def most_probable_labels(posterior: Tensor, masks: Tensor) -> Tensor:
    """masks with the most probable class at each valid pixel."""
    return torch.where(valid_pixels(masks), posterior.argmax(1).to(masks.dtype), masks)
