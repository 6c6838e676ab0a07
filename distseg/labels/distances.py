"""Where a pixel lies relative to the drawn contours: the drawn class and the signed distance to its contour, in bins.

Distances are in sizes of the drawn object, the root of its area, or in quarters of the side of the frame, the root of
its area, for annotators who err by as many pixels whatever they draw. Neither depends on the resolution.
Masks (N, H, W) class ids, 0 background, 255 = ignore; bins (N, H, W) uint8 in [0, bin_count(classes)), or 255:

    0 … OUTSIDE − 1                          background, the last nearest to an object
    OUTSIDE … OUTSIDE + INSIDE − 1           class 1, the first nearest to its own contour
    …                                        classes 2, 3, … alike
    the last                                 the mask shows no object at all
    255                                      ignored: the mask says nothing of the pixel
"""

import torch
from torch import Tensor

from distseg import ops

OUTSIDE_EDGES = (1, 2, 4, 6, 8, 10, 12, 15, 20, 30)
INSIDE_EDGES = (1, 2, 4, 6, 8)
"""Distances to the contour between bins, in twentieths of the size of the object. The radius of a disc is 11.3."""
OUTSIDE = len(OUTSIDE_EDGES) + 1
INSIDE = len(INSIDE_EDGES) + 1
MOST_CLASSES = (ops.IGNORE - OUTSIDE - 1) // INSIDE + 1
"""Whose bins a byte has numbers for, beside the one of ignored pixels."""


def bin_count(classes: int) -> int:
    return OUTSIDE + INSIDE * (classes - 1) + 1


def drawn_class(classes: int, device: torch.device) -> Tensor:
    """(bin_count,) int64: the class that was drawn at the pixels of each bin."""
    inside = torch.arange(1, classes, device=device).repeat_interleave(INSIDE)
    return torch.cat([inside.new_zeros(OUTSIDE), inside, inside.new_zeros(1)])


def signed_distance_bins(masks: Tensor, classes: int = 2, of_frame: bool = False) -> Tensor:
    """The bin of each pixel, by sizes of the objects or, `of_frame`, by quarters of the frame's side.

    Beside an ignored pixel another is as near to a contour as beside background. Distances are Euclidean and exact,
    from the pixel's centre to the contour, half a pixel before the nearest centre on the other side. Nothing waits for
    the device. Raises ValueError for more than MOST_CLASSES.
    """
    area = max(1, masks.shape[-2] * masks.shape[-1] // 16) if of_frame else 0
    return ops.signed_distance_bins(masks, classes, OUTSIDE_EDGES, INSIDE_EDGES, area)
