"""Masks that are too large, too small or beside their place."""

from typing import Annotated, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.noise.kind import AnnotatorKind, Image, Mask
from distseg.section import Fraction


class BoundaryNoise(AnnotatorKind):
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
    """`mask` moved along `direction` (rows, columns) until `wrong` pixels differ, to the nearest whole step.

    The count of wrong pixels is no monotone function of the step: every step is counted that leaves some of the lesion
    in the frame. Of two that are as near the shorter one is taken.
    """
    area, nearest, least = int(mask.sum()), (0, 0), int(mask.sum()) + 1
    top, bottom, left, right = _extent(mask)
    lesion, integral = mask[top:bottom, left:right], np.asarray(cv2.integral(mask), np.int32)
    for distance in range(2 * sum(mask.shape)):
        rows, columns = (int(step) for step in np.rint(distance * direction))
        inside = _in_frame(integral, rows, columns)
        if inside == 0:
            break  # and farther out there is none either
        missed = abs(area + inside - 2 * _overlap(lesion, rows, columns) - wrong)
        if missed < least:
            nearest, least = (rows, columns), missed
    moved = np.zeros_like(mask)
    target, source = _windows(mask.shape, *nearest)
    moved[target] = mask[source]
    return moved


def _windows(shape: tuple[int, ...], rows: int, columns: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the pixels of a frame go that is moved by (rows, columns), and where they come from."""
    steps = tuple(zip(shape, (rows, columns), strict=True))
    target = tuple(slice(max(step, 0), max(side + min(step, 0), 0)) for side, step in steps)
    source = tuple(slice(max(-step, 0), max(side - max(step, 0), 0)) for side, step in steps)
    return target, source


def _extent(mask: Mask) -> tuple[int, int, int, int]:
    """First row, row after the last, first column, column after the last of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _in_frame(integral: NDArray[np.int32], rows: int, columns: int) -> int:
    """How many of the lesion's pixels a shift leaves in the frame."""
    height, width = integral.shape[0] - 1, integral.shape[1] - 1
    top, bottom, left, right = max(-rows, 0), height - max(rows, 0), max(-columns, 0), width - max(columns, 0)
    if top >= bottom or left >= right:
        return 0
    return int(integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left])


def _overlap(lesion: Mask, rows: int, columns: int) -> int:
    """How many pixels the lesion shares with itself moved by a shift."""
    target, source = _windows(lesion.shape, rows, columns)
    return int(np.count_nonzero(lesion[target] & lesion[source]))
