"""Distances between outlines. The only importer of surface_distance.

That library is of the authors of the surface Dice (Nikolov et al. 2021, arXiv 1809.04430), needs numpy and scipy alone,
and weighs each piece of an outline by its length. MONAI counts pixels of the border and brings itself along; medpy has
no surface Dice and the GPL; SimpleITK has no percentile of the Hausdorff distance.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distseg.errors import UserError


class SurfaceScores(NamedTuple):
    hausdorff95: float
    """Pixels: the larger of the two 95th percentiles of the distances from one outline to the other."""
    surface_dice: float
    """The share of both outlines that is within the tolerance of the other one."""


def surface_scores(prediction: NDArray[np.bool_], truth: NDArray[np.bool_], tolerance: float) -> SurfaceScores:
    """Of two regions (H, W); `tolerance` in pixels.

    Two empty regions agree: (0, 1). Of one that is empty nothing has a distance: the image's diagonal stands for it,
    and the surface Dice is 0. Raises UserError where the library is not installed.
    """
    if not prediction.any() or not truth.any():
        alike = not prediction.any() and not truth.any()
        return SurfaceScores(0.0 if alike else math.hypot(*truth.shape), float(alike))
    try:
        import surface_distance
    except ImportError:
        raise UserError(
            "Hausdorff distances and surface Dice need surface-distance, which is not installed: pip install "
            "'distseg[surfaces]', or leave them out with --no-surfaces"
        ) from None
    # A margin of one pixel: the library looks at the pixels around both regions.
    prediction, truth = (np.pad(each, 1) for each in (prediction, truth))
    distances = surface_distance.compute_surface_distances(truth, prediction, (1.0, 1.0))
    return SurfaceScores(
        float(surface_distance.compute_robust_hausdorff(distances, 95)),
        float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)),
    )
