"""The label that a pixel most probably has, from what the network expects there and from where the drawn contour runs.

    log P(1 | x, y) / P(0 | x, y) = z(x) + log P(m | 1) / P(m | 0)

z is the network's logit and m the pixel's *mark*: on which side of the drawn contour it lies and how far off, in bins
and in units of the drawn lesion's size (the root of its area). P(m | c), how annotators err, is counted on the noisy
stream, with what the network expects in place of the truth (Dawid and Skene 1979, "Maximum Likelihood Estimation of
Observer Error-Rates Using the EM Algorithm"; with a network for the prior, Bekker and Goldberger 2016, "Training Deep
Neural-Networks Based on Unreliable Labels"). Theirs is one matrix of labels. The distance is what masks add to labels:
annotators err by where they put the contour, so background close to a drawn lesion is another thing than background far
from it. Under masks that miss the rim, near background says little and far background much.

Masks (B, H, W) class ids, 0 background, 1 lesion, 255 = ignore; logits (B, 1, H, W), or (B, 2, H, W) of both classes;
marks (B, H, W) int64 in [0, MARKS); counts (2, MARKS) float64, rows the expected class.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distseg.ops import IGNORE, valid_pixels

_EDGES = (-1.5, -1.0, -0.75, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Between marks, in sizes of the lesion; negative outside. The radius of a disc is 0.56."""
MARKS = len(_EDGES) + 1
_DOUBT = 1e-3
"""The share of each class that is spread over all marks, so that one which has not occurred says nothing."""


def marks_of(masks: Tensor) -> Tensor:
    """On which side of the drawn contour each pixel lies, and how far off; 0, the farthest outside, without a lesion.

    Distances are Euclidean and exact, from the pixel's centre to the contour, half a pixel before the nearest centre on
    the other side. They are found on the host, mask by mask, which waits for masks that are on a GPU.
    """
    distances = np.stack([_signed_distance(lesion) for lesion in (masks == 1).cpu().numpy()])
    return torch.bucketize(torch.as_tensor(distances, device=masks.device), torch.tensor(_EDGES, device=masks.device))


def trusting_counts(device: torch.device) -> Tensor:
    """Of annotators who do not err."""
    inside = torch.tensor((-np.inf, *_EDGES), device=device) >= 0
    return torch.stack([~inside, inside]).double()


def expected_counts(logits: Tensor, masks: Tensor, marks: Tensor) -> Tensor:
    """How many of the valid pixels of each mark the network expects to be of each class: Σ p_c [m]."""
    valid = valid_pixels(masks)
    lesion = torch.where(valid, _lesion_logit(logits).sigmoid(), 0.0)
    # Mark by mark: a weighted bincount adds in no fixed order on a GPU, and a resumed run must give the same bits.
    here = [valid & (marks == mark) for mark in range(MARKS)]
    of_mark = torch.stack([pixels.sum() for pixels in here])
    of_lesion = torch.stack([(lesion * pixels).sum(dtype=torch.float64) for pixels in here])
    return torch.stack([of_mark - of_lesion, of_lesion])


def corrected(logits: Tensor, masks: Tensor, marks: Tensor, counts: Tensor) -> Tensor:
    """masks with the more probable class at each valid pixel, by `expected_counts` of many pixels."""
    counts = counts + _DOUBT * counts.sum(1, keepdim=True).clamp(min=1) / MARKS
    likelihood = (counts / counts.sum(1, keepdim=True)).log()
    lesion = _lesion_logit(logits) + (likelihood[1] - likelihood[0])[marks] > 0
    return torch.where(valid_pixels(masks), lesion.to(masks.dtype), IGNORE)


def _signed_distance(lesion: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W) to the contour of the lesion (H, W), in sizes of it; negative outside."""
    if not lesion.any():
        return np.full(lesion.shape, -np.inf, np.float32)
    inside, outside = (
        cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for side in (lesion, ~lesion)
    )
    return np.where(lesion, inside - 0.5, 0.5 - outside) / np.float32(np.sqrt(lesion.sum()))


def _lesion_logit(logits: Tensor) -> Tensor:
    """(B, H, W). Raises ValueError for more than two classes."""
    if logits.shape[1] > 2:
        raise ValueError(f"logits of {logits.shape[1]} classes; labels are corrected between background and lesion")
    return logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]
