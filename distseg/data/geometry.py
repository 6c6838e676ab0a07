"""Where a file's pixels lie in the network's input, and back.

A file is resampled as a whole to a picture, which lies on a canvas; what the picture leaves free is padding. Squashed
and letterboxed, the canvas is the network's square input. Cropped, it is the whole picture at a fixed scale, and the
network sees windows of it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distseg.data.classes import IGNORE

Shape = Literal["squash", "letterbox", "crop"]

PADDING = (180, 151, 139)
"""RGB of padding in images: the channel means (augment.py) to half a grey level; normalised it is within 0.013 of 0."""
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class Placement:
    """A picture of height×width pixels whose first one lies at (top, left) of a canvas (rows, columns)."""

    canvas: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def picture(self) -> tuple[slice, slice]:
        """The rows and columns of the canvas that it covers."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def laid(self, picture: NDArray[np.uint8], fill: int | tuple[int, ...]) -> NDArray[np.uint8]:
        """(height, width[, 3]) on its canvas, the rest `fill`; the picture itself where there is no rest."""
        if picture.shape[:2] == self.canvas:
            return picture
        canvas = np.empty((*self.canvas, *picture.shape[2:]), np.uint8)
        canvas[:] = fill
        canvas[self.picture] = picture
        return canvas


@dataclass(frozen=True)
class Frame:
    """The network's input, size×size, and how files become one: the keys of `data` that concern shape."""

    size: int
    shape: Shape = "squash"
    scale: float = 1.0
    """Of crops: pixels of the network's input per pixel of the file."""

    def place(self, height: int, width: int) -> Placement:
        """The place of a file of height×width pixels. Where half a pixel decides, it is the lower number."""
        if self.shape == "squash":
            return Placement((self.size, self.size), 0, 0, self.size, self.size)
        scale = self.size / max(height, width) if self.shape == "letterbox" else self.scale
        own = _scaled(height, scale), _scaled(width, scale)
        canvas = max(own[0], self.size), max(own[1], self.size)
        return Placement(canvas, (canvas[0] - own[0]) // 2, (canvas[1] - own[1]) // 2, *own)

    @property
    def image_fill(self) -> tuple[int, int, int]:
        """RGB of what an image is padded with and what augmentation brings in from outside of it."""
        return _BLACK if self.shape == "squash" else PADDING

    @property
    def mask_fill(self) -> int:
        """The same of masks: neither learned from nor scored. Outside of a squashed image is background, as in the
        paper's released code."""
        return 0 if self.shape == "squash" else IGNORE


def _scaled(length: int, scale: float) -> int:
    return max(1, math.ceil(length * scale - 0.5))


def cut(pixels: NDArray[np.uint8], window: tuple[float, float] | None, size: int) -> NDArray[np.uint8]:
    """The size×size window of a canvas (H, W[, 3]), H and W ≥ size, or with None the whole.

    `window` is two numbers in [0, 1), uniform if each place is to be as probable: 0 is the first row, column.
    """
    if window is None:
        return pixels
    top, left = (int(part * (length - size + 1)) for part, length in zip(window, pixels.shape, strict=False))
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def tile_starts(length: int, size: int, overlap: float) -> list[int]:
    """Where the fewest tiles of `size` begin that cover range(length), length ≥ size, each `overlap` in the next."""
    step = max(1, int(size * (1 - overlap)))
    more = -(-(length - size) // step)
    return [number * (length - size) // more for number in range(more + 1)] if more else [0]


def tile_weights(size: int) -> NDArray[np.float64]:
    """(size,): 1 at a tile's ends, growing by 1 to its middle; a pixel's weight is that of its row times its column.

    Small integers: with logits in float32, sums and products in float64 are exact, so that blending the same values
    gives that value.
    """
    ends: NDArray[Any] = np.arange(1, size + 1)
    return np.minimum(ends, ends[::-1]).astype(np.float64)
