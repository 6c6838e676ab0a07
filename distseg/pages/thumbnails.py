"""Small pictures for pages that show hundreds: walls of thumbnails, and images with the outlines of their masks."""

from collections.abc import Sequence
from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WALL_TILE = 48
"""Side of a wall's tiles, pixels."""
OUTLINES = ("#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#B3A2F2", "#FFFFFF", "#66C2A5")
"""Okabe and Ito's colours and three more: the reference has the first, annotators have the others in turn."""
_RIM = (30, 30, 30)
"""Keeps an outline visible on bright and on dark ground."""
_SHADE = (230, 30, 30)
_FEW_MASKS = 3
"""Of an image; more have finer outlines."""
_QUALITY = 85


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """The JPEG of (h, w, 3) uint8 RGB."""
    return cv2.imencode(".jpg", pixels[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, _QUALITY))[1].tobytes()


def wall(tiles: Sequence[bytes], columns: int) -> bytes:
    """A JPEG of encoded 48×48 tiles, row by row, on white."""
    rows = -(-len(tiles) // columns)
    pixels = np.full((rows * WALL_TILE, columns * WALL_TILE, 3), 255, np.uint8)
    for place, tile in enumerate(tiles):
        top, left = WALL_TILE * (place // columns), WALL_TILE * (place % columns)
        pixels[top : top + WALL_TILE, left : left + WALL_TILE] = np.asarray(Image.open(BytesIO(tile)))
    return jpeg(pixels)


def outlined(image: NDArray[np.uint8], masks: Sequence[tuple[str, NDArray[np.uint8]]], side: int) -> NDArray[np.uint8]:
    """An image with the outlines of class ids, 255 = ignore, each in the colour (#rrggbb) beside it.

    `image` (H, W, 3) uint8 RGB and masks (H, W), or of another size and then stretched. Returns (h, w, 3) uint8 whose
    longer side is `side`.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    drawn = np.asarray(
        cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), np.uint8
    )
    width = 2 if len(masks) <= _FEW_MASKS else 1
    for colour, mask in masks:
        ids = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        lit = ((ids > 0) & (ids != 255)).astype(np.uint8)
        contours, _ = cv2.findContours(lit, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, _RIM, width + 2, cv2.LINE_AA)
        cv2.drawContours(drawn, contours, -1, _rgb(colour), width, cv2.LINE_AA)
    return drawn


def shaded(image: NDArray[np.uint8], values: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """An image in grey, the redder the higher `values` (H, W) in [0, 1] are, which are stretched over it.

    `image` and what is returned are as in `outlined`.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    share = np.clip(cv2.resize(values, size, interpolation=cv2.INTER_LINEAR), 0, 1)[..., None]
    return np.rint(grey[..., None] * (1 - share) + np.array(_SHADE, np.float32) * share).astype(np.uint8)


def outline_colours(keys: Sequence[str]) -> dict[str, str]:
    """A colour for each kind of mask: `reference` has its own, the others take turns."""
    others = [key for key in keys if key != "reference"]
    return {"reference": OUTLINES[0]} | {
        key: OUTLINES[1 + place % (len(OUTLINES) - 1)] for place, key in enumerate(others)
    }


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue
