"""Where a pixel lies relative to the drawn contour: its signed distance, in bins.

Distances are in sizes of the drawn object, the root of its area, so that bins do not depend on the resolution.
Masks (B, H, W) class ids, 0 background, 1 lesion, 255 = ignore; bins (B, H, W) int64 in [0, BINS).
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EDGES = (-1.5, -1.0, -0.75, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Between bins, in sizes of the lesion; negative outside. The radius of a disc is 0.56."""
BINS = len(EDGES) + 1


def signed_distance_bins(masks: Tensor) -> Tensor:
    """The bin of each pixel's signed distance to the drawn contour; 0, the farthest outside, without a lesion.

    Distances are Euclidean and exact, from the pixel's centre to the contour, half a pixel before the nearest centre on
    the other side. They are computed on the host, mask by mask, which waits for masks that are on a GPU.
    """
    distances = np.stack([_signed_distance(lesion) for lesion in (masks == 1).cpu().numpy()])
    return torch.bucketize(torch.as_tensor(distances, device=masks.device), torch.tensor(EDGES, device=masks.device))


def bins_inside(device: torch.device) -> Tensor:
    """(BINS,) bool: which bins lie inside the drawn contour."""
    return torch.tensor((-np.inf, *EDGES), device=device) >= 0


def _signed_distance(lesion: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W) distance to the contour of the lesion (H, W), in sizes of it; negative outside."""
    if not lesion.any():
        return np.full(lesion.shape, -np.inf, np.float32)
    inside, outside = (
        cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for side in (lesion, ~lesion)
    )
    distances = np.where(lesion, inside - 0.5, 0.5 - outside) / np.float32(np.sqrt(lesion.sum()))
    return distances.astype(np.float32, copy=False)
