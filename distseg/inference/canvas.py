"""One image as the network is to see it: read whole, or, where tiles are cut from it, as it lies in memory."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distseg.data.augment import identity_transform
from distseg.data.decode import Decoding, read_canvas, read_picture, rgb_window
from distseg.data.geometry import Frame


class Canvas:
    """An image on the canvas of a frame. `tile` gives what the network takes."""

    def __init__(self, path: Path, frame: Frame, decoding: Decoding) -> None:
        """Decodes the file. Raises BadFileError.

        Cropped at the file's own scale it stays as PIL has it, one copy, and the canvas is never made.
        """
        self._frame = frame
        self._colour = identity_transform(frame.size).colour
        self._picture: Image.Image | None = None
        self._pixels: NDArray[np.uint8] | None = None
        if frame.shape == "crop" and frame.scale == 1:
            self._picture = read_picture(path, decoding)
            self.width, self.height = self._picture.size
        else:
            self._pixels, (self.height, self.width) = read_canvas(path, frame, decoding)
        self.place = frame.place(self.height, self.width)

    def tile(self, top: int, left: int) -> NDArray[np.float32]:
        """(3, size, size) from the canvas's row and column on, normalised as in training (torch_loader.py)."""
        size = self._frame.size
        pixels = self._cut(top, left, size) if self._pixels is None else self._pixels[top:, left:][:size, :size]
        coloured = cv2.transform(pixels.astype(np.float32), self._colour)
        return np.ascontiguousarray(np.asarray(coloured, np.float32).transpose(2, 0, 1))

    def _cut(self, top: int, left: int, size: int) -> NDArray[np.uint8]:
        assert self._picture is not None
        place = self.place
        rows = max(top - place.top, 0), min(top + size - place.top, place.height)
        columns = max(left - place.left, 0), min(left + size - place.left, place.width)
        part = rgb_window(self._picture, rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])
        if part.shape[:2] == (size, size):
            return part
        tile = np.empty((size, size, 3), np.uint8)
        tile[:] = self._frame.image_fill
        first_row, first_column = rows[0] + place.top - top, columns[0] + place.left - left
        tile[first_row : first_row + part.shape[0], first_column : first_column + part.shape[1]] = part
        return tile
