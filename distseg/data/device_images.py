"""Decoded images in a GPU's memory: each is decoded and uploaded once, and no epoch after that moves it again."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distseg.data.config import DataConfig
from distseg.data.sample import Sample


def fit_on_device(samples: Sequence[Sample], config: DataConfig, device: torch.device) -> bool:
    """Whether `device` is a GPU on which `config.device_memory` holds the images of all `samples`, as uint8 RGB.

    Never of crops, whose canvases are of any size. All or none, because the decoder depends on it: one stream's pixels
    come from one decoder, whatever has been seen.
    """
    if device.type != "cuda" or config.shape == "crop":
        return False
    images = {sample.image for sample in samples}
    return len(images) * 3 * config.image_size**2 <= config.device_memory * 2**30


class DeviceImages:
    """Images at network resolution on `device`; several threads may ask at once. Nothing is ever given back.

    On a GPU this has not been run yet; tests/gpu holds it to what the CPU gives.
    """

    def __init__(self, read: Callable[[Path], NDArray[np.uint8]], device: torch.device) -> None:
        """`read` gives (size, size, 3) uint8 of a file, as PixelReader.image does."""
        self._read = read
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Of its own, so that neither uploads nor a loader's copies queue behind the kernels of training."""
        self._kept: dict[Path, Tensor] = {}
        self._lock = threading.Lock()

    def image(self, path: Path) -> Tensor:
        """(size, size, 3) uint8, not to be written to; any stream may read it. Raises BadFileError."""
        kept = self._kept.get(path)
        if kept is None:
            uploaded = self._upload(self._read(path))
            with self._lock:
                kept = self._kept.setdefault(path, uploaded)
        return kept

    def _upload(self, pixels: NDArray[np.uint8]) -> Tensor:
        tensor = torch.from_numpy(pixels.copy())
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                tensor = tensor.to(self._device)
            self.stream.synchronize()  # by a reading thread; from here on every stream may read it
        return tensor
