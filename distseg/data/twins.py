"""Images that show the same scene: copies that were turned, saved again, reduced or given other colours.

Files of the same bytes are found by their digest; these are found by what they show. Two images are twins where their
thumbnails correlate in grey *and* without their smooth part, in one of the eight ways a square can be turned and
mirrored. The grey alone takes two centred blobs for one another; the detail alone is noise in smooth images.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_LEAST_GREY = 0.975
_LEAST_DETAIL = 0.93
"""Correlations of 16×16 thumbnails. Set on dermoscopy (ISIC 2017), CT and cells: no false pair in the three, by eye."""
_LEAST_COARSE = 0.97
"""Of 8×8 thumbnails, a quarter of the arithmetic, for all pairs; only what passes is looked at closer."""
_LEAST_DEVIATION = 2.0
"""Grey levels; what varies less shows nothing that could be the same."""
_SMOOTH = 1.0
"""Deviation of the Gaussian that the detail is without, pixels of the thumbnail."""
_BLOCK = 512
_MOST_OF_BLOCK = 20_000
"""Pairs of a block of images that are looked at closer, the most alike first: bounds memory where all are alike."""


@dataclass(frozen=True, order=True)
class Pair:
    first: int
    second: int
    """Places in the arrays that were given; first < second."""
    likeness: float
    """The correlation of the grey thumbnails, at most 1."""


def find_twins(thumbnails: NDArray[np.uint8]) -> list[Pair]:
    """The pairs among (N, 16, 16, 3) uint8 thumbnails, the most alike first.

    Every pair is compared, by products of matrices in blocks: 50 N² multiply-adds in each of 8 ways, and 512 N numbers
    in memory. Crops and small shifts are not found.
    """
    greys = thumbnails.astype(np.float32).mean(axis=3)
    shown = np.flatnonzero(greys.std(axis=(1, 2)) >= _LEAST_DEVIATION)
    if len(shown) < 2:
        return []
    greys = greys[shown]
    grey, detail, coarse = _normalised(greys), _normalised(_detail(greys)), _normalised(_halved(greys))
    pairs: dict[tuple[int, int], float] = {}
    for turn in range(8):
        turned_coarse, turned_grey, turned_detail = (_turned(maps, turn) for maps in (coarse, grey, detail))
        for start in range(0, len(shown), _BLOCK):
            # Of every pair once: the second is at or behind the block's start.
            products = turned_coarse[start : start + _BLOCK] @ coarse[start:].T
            first, second = np.nonzero(products >= _LEAST_COARSE)
            later = second > first
            first, second = first[later], second[later]
            if len(first) > _MOST_OF_BLOCK:
                best = np.argpartition(-products[first, second], _MOST_OF_BLOCK)[:_MOST_OF_BLOCK]
                first, second = first[best], second[best]
            first, second = first + start, second + start
            alike = np.einsum("ij,ij->i", turned_grey[first], grey[second])
            fine = np.einsum("ij,ij->i", turned_detail[first], detail[second])
            for place in np.flatnonzero((alike >= _LEAST_GREY) & (fine >= _LEAST_DETAIL)):
                key = int(shown[first[place]]), int(shown[second[place]])
                pairs[key] = max(pairs.get(key, 0.0), min(float(alike[place]), 1.0))
    return sorted((Pair(*key, likeness) for key, likeness in pairs.items()), key=lambda pair: (-pair.likeness, pair))


def _detail(greys: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([grey - cv2.GaussianBlur(grey, (0, 0), _SMOOTH) for grey in greys])


def _halved(greys: NDArray[np.float32]) -> NDArray[np.float32]:
    count, height, width = greys.shape
    return greys.reshape(count, height // 2, 2, width // 2, 2).mean(axis=(2, 4))


def _normalised(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, S, S) to (N, S²) of mean 0 and norm 1, so that a product is a correlation."""
    rows = maps.reshape(len(maps), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _turned(rows: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """Rows of square maps, each turned by `turn` right angles, from 4 on mirrored first."""
    side = int(np.sqrt(rows.shape[1]))
    maps = rows.reshape(-1, side, side)
    maps = maps[:, :, ::-1] if turn >= 4 else maps
    return np.ascontiguousarray(np.rot90(maps, turn % 4, axes=(1, 2))).reshape(rows.shape)
