"""The annotator model: what a pixel's label most probably is, given what the network expects and what was drawn.

    log P(c | x, m) = log P(c | x) + log P(m | c) + const

P(c | x) is the network's calibrated probability (calibration.py) and m the bin of the pixel: the drawn class and the
signed distance to its contour (distances.py). P(m | c), how annotators err, is counted on the noisy stream, with what
is expected there in place of the truth (Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates
Using the EM Algorithm"; with a network for the prior, Bekker and Goldberger 2016, "Training Deep Neural-Networks Based
on Unreliable Labels"). Their model has one confusion matrix per annotator. Masks have distances too: annotators err by
where they put the contour, so background close to a drawn lesion says something else than background far from it. Under
masks that miss the rim, near background says little and far background much.

`ops.correct_labels` has the posterior, its labels and its counts in one pass. Counts (…, C, bins) float64, rows the
expected class.
"""

import torch
from torch import Tensor

from distseg.labels.distances import drawn_class

SMOOTHING = 1e-3
"""Additive smoothing: this share of each class's count is spread evenly over all bins, so that a bin which has not
occurred says nothing."""


def identity_prior(classes: int, device: torch.device) -> Tensor:
    """(C, bins), counts of annotators who do not err: a bin occurs where the truth is what was drawn."""
    return torch.nn.functional.one_hot(drawn_class(classes, device), classes).T.double().contiguous()


def log_likelihood(counts: Tensor) -> Tensor:
    """log P(m | c), like the counts (…, C, bins) of many pixels."""
    counts = counts + SMOOTHING * counts.sum(-1, keepdim=True).clamp(min=1) / counts.shape[-1]
    return (counts / counts.sum(-1, keepdim=True)).log()
