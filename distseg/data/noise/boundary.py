"""Masks that are too large, too small or beside their place."""

from typing import Annotated, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.noise.kind import Image, Mask, NoiseKind
from distseg.section import Fraction


class BoundaryNoise(NoiseKind):
    kind: Literal["boundary"] = "boundary"
    alpha: Fraction = 0.7
    """The fraction of masks that are drawn wrong."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Wrong pixels as a fraction of the lesion's area."""

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        return boundary(mask, self.alpha, self.beta, rng)


def boundary(mask: Mask, alpha: float, beta: float, rng: np.random.Generator) -> Mask:
    """The lesion drawn too large, too small or beside its place, in a fraction `alpha` of the masks.

    One of the three at random, until the wrong pixels are a fraction `beta` of the lesion's area: the literature's
    protocol with alpha in {0.3, 0.5, 0.7} and beta in {0.5, 0.7} (Gonzalez-Jimenez et al. 2023, section 3). Too large
    and too small hit the fraction to the pixel, pixels nearest to the contour first; the shift, in a random direction,
    comes as near as whole pixels allow. What leaves the frame is lost; a lesion is never erased, and one that the frame
    keeps from growing grows as far as there is room.
    """
    altered, way, direction = rng.random() < alpha, rng.integers(3), rng.random() * 2 * np.pi
    area = int(mask.sum())
    if not altered or area == 0:
        return mask.copy()
    wrong = round(beta * area)
    if way == 0:
        return _flip_nearest(mask, 0, wrong)
    if way == 1:
        return _flip_nearest(mask, 1, min(wrong, area - 1))
    return _shifted(mask, wrong, np.array([np.sin(direction), np.cos(direction)]))


def _flip_nearest(mask: Mask, label: int, count: int) -> Mask:
    """Flip the `count` pixels of `label` that are nearest to the other label, or all where there are fewer.

    The frame's outside is background: a lesion that touches it is eroded from there as well.
    """
    framed = np.pad(mask, 1) == label
    distance = cv2.distanceTransform(framed.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    squared = np.rint(distance.astype(np.float64) ** 2).astype(np.int64)
    candidates = np.flatnonzero(mask == label)
    nearest = candidates[np.argsort(squared.ravel()[candidates], kind="stable")[:count]]
    drawn = mask.copy()
    drawn.ravel()[nearest] ^= 1
    return drawn


def _shifted(mask: Mask, wrong: int, direction: NDArray[np.float64]) -> Mask:
    """`mask` moved along `direction` (rows, columns) until `wrong` pixels differ, to the nearest whole step."""

    def moved(distance: int) -> Mask:
        rows, columns = np.rint(distance * direction)
        matrix = np.float64([[1, 0, columns], [0, 1, rows]])
        return cv2.warpAffine(mask, matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST)

    def differing(distance: int) -> int:
        return int(np.count_nonzero(moved(distance) != mask))

    # Bisection between a shift that changes too little and one that changes enough; once the lesion has left the frame
    # its whole area is wrong.
    low, high = 0, 2 * sum(mask.shape)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if differing(middle) < wrong else (low, middle)
    nearest = low if wrong - differing(low) <= differing(high) - wrong else high
    return moved(nearest) if moved(nearest).any() else moved(low)
