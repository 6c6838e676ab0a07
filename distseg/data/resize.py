"""Masks at another size, about the same centre as the image that they belong to."""

import cv2
import numpy as np
from numpy.typing import NDArray

_MOST_CELLS = 16
"""Up to so many pixels of the mask in one of the output's they are counted one by one, in a tenth of the time."""


def resize_mask(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W) uint8 class ids to (height, width): each output pixel has the class that covers most of its area.

    A tie goes to the lowest id: to background in a binary mask, and to a class before 255, ignore, which takes part as
    a class of its own. Areas are integers, so no rounding decides. Enlarged, a mask is that of nearest neighbours.
    """
    if mask.shape == (height, width):
        return mask
    rows, columns = mask.shape[0] // height, mask.shape[1] // width
    whole = mask.shape == (rows * height, columns * width) and rows * columns <= _MOST_CELLS
    if mask.max(initial=0) <= 1:
        if whole:
            return (2 * _counted(mask, rows, columns) > rows * columns).view(np.uint8)
        return (2 * _area(mask, height, width) > mask.size).astype(np.uint8)
    ids = np.unique(mask)
    if whole:
        areas = np.stack([_counted((mask == id).view(np.uint8), rows, columns) for id in ids])
    else:
        areas = np.stack([_area((mask == id).astype(np.uint8), height, width) for id in ids])
    return ids[np.argmax(areas, axis=0)]


def _counted(mask: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.int16]:
    """The number of 1s in each block of rows × columns pixels of a mask in {0, 1}."""
    counts = np.zeros((mask.shape[0] // rows, mask.shape[1] // columns), np.int16)
    for row, column in np.ndindex(rows, columns):
        counts += mask[row::rows, column::columns]
    return counts


def _area(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.int64]:
    """The area of 1s in each output pixel of a mask in {0, 1}; a whole output pixel counts `mask.size`.

    By the integral image, which between the corners of the source's pixels is bilinear, at the corners of the output's.
    """
    integral = cv2.integral(mask)
    # A corner of the output at j·H/height in source pixels: the whole ones before it, and a rest in 1/height.
    row, row_rest = _corners(mask.shape[0], height)
    column, column_rest = _corners(mask.shape[1], width)

    def along_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        before, after = integral[rows][:, column], integral[rows][:, np.minimum(column + 1, mask.shape[1])]
        return before.astype(np.int64) * (width - column_rest) + after.astype(np.int64) * column_rest

    before, after = along_rows(row), along_rows(np.minimum(row + 1, mask.shape[0]))
    at_corners = before * (height - row_rest)[:, None] + after * row_rest[:, None]
    return np.ascontiguousarray(np.diff(np.diff(at_corners, axis=0), axis=1))


def _corners(source: int, output: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    position = np.arange(output + 1, dtype=np.int64) * source
    return position // output, position % output
