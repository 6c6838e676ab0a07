"""The annotator model: the most probable label of a pixel, given what the network expects and where the contour runs.

    log P(1 | x, y) / P(0 | x, y) = z(x) + log P(m | 1) / P(m | 0)

z is the network's logit and m the bin of the pixel's signed distance to the drawn contour (distances.py). P(m | c), how
annotators err, is counted on the noisy stream, with what the network expects in place of the truth (Dawid and Skene
1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm"; with a network for the prior,
Bekker and Goldberger 2016, "Training Deep Neural-Networks Based on Unreliable Labels"). Their model has one confusion
matrix per annotator. Masks have distances too: annotators err by where they put the contour, so background close to a
drawn lesion says something else than background far from it. Under masks that miss the rim, near background says
little and far background much.

Masks (B, H, W) class ids, 0 background, 1 lesion, 255 = ignore; logits (B, 1, H, W), or (B, 2, H, W) of both classes;
bins (B, H, W) int64 in [0, BINS); counts (2, BINS) float64, rows the expected class. All are pure functions.
"""

import torch
from torch import Tensor

from distseg.labels.distances import BINS, bins_inside
from distseg.ops import IGNORE, valid_pixels

SMOOTHING = 1e-3
"""Additive smoothing: this share of each class's count is spread evenly over all bins, so that a bin which has not
occurred says nothing."""


def identity_prior(device: torch.device) -> Tensor:
    """Counts of annotators who do not err: background outside the contour, lesion inside."""
    inside = bins_inside(device)
    return torch.stack([~inside, inside]).double()


def expected_counts(logits: Tensor, masks: Tensor, bins: Tensor) -> Tensor:
    """How many of the valid pixels of each bin the network expects to be of each class: Σ p_c [m].

    Raises ValueError for logits of more than two classes.
    """
    valid = valid_pixels(masks)
    lesion = torch.where(valid, _lesion_logit(logits).sigmoid(), 0.0)
    # Bin by bin: a weighted bincount adds in no fixed order on a GPU, and a resumed run must give the same bits.
    in_bin = [valid & (bins == index) for index in range(BINS)]
    all_pixels = torch.stack([pixels.sum() for pixels in in_bin])
    of_lesion = torch.stack([(lesion * pixels).sum(dtype=torch.float64) for pixels in in_bin])
    return torch.stack([all_pixels - of_lesion, of_lesion])


def most_probable_labels(logits: Tensor, masks: Tensor, bins: Tensor, counts: Tensor) -> Tensor:
    """masks with the more probable class at each valid pixel, by `expected_counts` of many pixels.

    Raises ValueError for logits of more than two classes.
    """
    counts = counts + SMOOTHING * counts.sum(1, keepdim=True).clamp(min=1) / BINS
    likelihood = (counts / counts.sum(1, keepdim=True)).log()
    lesion = _lesion_logit(logits) + (likelihood[1] - likelihood[0])[bins] > 0
    return torch.where(valid_pixels(masks), lesion.to(masks.dtype), IGNORE)


def _lesion_logit(logits: Tensor) -> Tensor:
    """(B, H, W). Raises ValueError for more than two classes."""
    if logits.shape[1] > 2:
        raise ValueError(f"logits of {logits.shape[1]} classes; labels are corrected between background and lesion")
    return logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]
