"""Where a pixel lies relative to the drawn contours: the drawn class and the signed distance to its contour, in bins.

Distances are in sizes of the drawn object, the root of its area, so that bins do not depend on the resolution.
Masks (B, H, W) class ids, 0 background, 255 = ignore; bins (B, H, W) int64 in [0, bin_count(classes)):

    0 … OUTSIDE − 1                          background, by the distance to the nearest object
    OUTSIDE … OUTSIDE + INSIDE − 1           class 1, by the distance to its own contour
    …                                        classes 2, 3, … alike
    the last                                 the mask shows no object at all
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EDGES = (-1.5, -1.0, -0.75, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Between bins, in sizes of the object; negative outside. The radius of a disc is 0.56."""
OUTSIDE = EDGES.index(0.0) + 1
INSIDE = len(EDGES) + 1 - OUTSIDE


def bin_count(classes: int) -> int:
    return OUTSIDE + INSIDE * (classes - 1) + 1


def drawn_class(classes: int, device: torch.device) -> Tensor:
    """(bin_count,) int64: the class that was drawn at the pixels of each bin."""
    inside = torch.arange(1, classes, device=device).repeat_interleave(INSIDE)
    return torch.cat([inside.new_zeros(OUTSIDE), inside, inside.new_zeros(1)])


def signed_distance_bins(masks: Tensor, classes: int = 2) -> Tensor:
    """The bin of each pixel. Ignored pixels count as background here.

    Distances are Euclidean and exact, from the pixel's centre to the contour, half a pixel before the nearest centre on
    the other side. They are computed on the host, mask by mask, which waits for masks that are on a GPU.
    """
    bins = np.stack([_bins_of_mask(mask, classes) for mask in masks.cpu().numpy()])
    return torch.as_tensor(bins, device=masks.device)


def _bins_of_mask(mask: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    objects = (mask > 0) & (mask < classes)
    if not objects.any():
        return np.full(mask.shape, bin_count(classes) - 1)
    bins = np.searchsorted(_EDGES, -_distance(~objects, objects.sum()))
    for index in range(1, classes):
        own = mask == index
        if own.any():
            beyond = np.searchsorted(_EDGES, _distance(own, own.sum()))
            bins = np.where(own, beyond + INSIDE * (index - 1), bins)
    return bins


def _distance(side: NDArray[np.bool_], area: int) -> NDArray[np.float32]:
    """(H, W) of the pixels in `side` to its contour, in roots of `area` pixels."""
    pixels = cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return (pixels - np.float32(0.5)) / np.float32(np.sqrt(area))


_EDGES = np.array(EDGES, np.float32)
