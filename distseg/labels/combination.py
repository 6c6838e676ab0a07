"""Several annotators of one image and the network, as one posterior; pure functions.

    log P(c | x, m_1 … m_R) = a·z_c + τ·Σ_r log P_r(m_r | c) + b_c + const

z are the network's relative logits, m_r the class that annotator r has drawn at the pixel. P_r is a confusion matrix
(Dawid and Skene 1979). Given the truth, annotators are not independent: what is hard to see is hard for all, and their
evidence would count several times. So the sum has an exponent τ, and a, τ and b are by maximum likelihood on clean
images that are annotated too and that the network has not learned from: a logistic regression (calibration.py).

Bins by distance (distances.py) are for one mask alone. All annotators know about where the object is, so that their
distances are far from independent, whatever τ: docs/ablation.md has the figures.

The sum, its labels and the expected counts are those of `ops.correct_labels`, to which the drawn class is the bin.
Annotations (B, R, H, W) uint8 class ids, 255 = ignore; annotators (B, R) int64, −1 = none; scores (B, C, H, W); counts
(A, C, C) float64: annotator, expected class, drawn class.
"""

import torch
from torch import Tensor

from distseg.data.classes import IGNORE

OWN_FROM = 10.0
"""Annotations of an annotator from which on the own counts weigh more than those of all. Pixels of one mask err
together, so that it counts as one observation."""


def annotation_counts(annotators: Tensor, count: int) -> Tensor:
    """(A,) float64: how many annotations of each there are."""
    return torch.nn.functional.one_hot(annotators.flatten() + 1, count + 1)[:, 1:].sum(0).double()


def reliability(counts: Tensor, annotations: Tensor, pooled: bool) -> Tensor:
    """log P_r(m | c), (A, C, C), from counts of as many `annotations` (A,).

    Each annotator's row c has a Dirichlet prior with the mean of all annotators' and the strength of OWN_FROM
    annotations, so that the posterior mean is (counts_r + OWN_FROM · Σ counts / Σ annotations) by its sum. Whoever has
    drawn n annotations weighs n : OWN_FROM against all. pooled: all have the counts of all.
    """
    everyone = counts.sum(0) / annotations.sum().clamp(min=1)
    own = torch.zeros_like(counts) if pooled else counts
    mixed = own + OWN_FROM * everyone
    # As little as one pixel in a thousand: nobody is never wrong.
    floor = 1e-3 * mixed.sum(2, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny)
    smoothed = mixed + floor / counts.shape[2]
    return (smoothed / smoothed.sum(2, keepdim=True)).log()


def annotator_scores(annotations: Tensor, annotators: Tensor, tables: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W): Σ_r log P_r(m_r | c), relative to class 0; tables (A, C, C) of `reliability`."""
    relative = tables - tables[:, :1]
    says_nothing = relative.new_zeros(len(relative), relative.shape[1], 1)
    relative = torch.cat([relative, says_nothing], 2).to(dtype)
    own = relative[annotators.clamp(min=0)].movedim(2, 3)  # (B, R, drawn, C)
    silent = (annotations == IGNORE) | (annotators < 0)[:, :, None, None]
    drawn = torch.where(silent, own.shape[2] - 1, annotations.long())
    batch = torch.arange(len(annotations), device=annotations.device)[:, None, None]
    scores = sum(own[:, place][batch, drawn[:, place]] for place in range(annotations.shape[1]))
    return torch.as_tensor(scores).movedim(-1, 1)
