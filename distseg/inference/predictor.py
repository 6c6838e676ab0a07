"""A run's network, and the one way from a file to what it says of each pixel, at the image's own size.

Files become input as in training and its scores: data.shape with its tiles, data.orientation, the same normalisation.
Nothing here grows with the number of images. Beside the decoded image and its mask, memory is taken for a batch, a row
of tiles and a strip of the result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from zlib_ng import zlib_ng

from distseg.data.config import DataConfig
from distseg.data.geometry import Placement
from distseg.errors import UserError
from distseg.evaluation.own_resolution import own_strips
from distseg.evaluation.tiles import predict_bands
from distseg.inference.canvas import Canvas
from distseg.labels.calibration import relative_logits
from distseg.training.checkpoint import chosen_checkpoint, digest_of_network, load_network

Probabilities = Literal["none", "png", "npz", "logits"]
LARGE = 2**24
"""Pixels of an image from which on memory is spared at the cost of time."""


@dataclass(frozen=True)
class Settings:
    """What decides the bits of a prediction, beside the network."""

    batch_size: int = 8
    """Images, or tiles of one image, at a time."""
    flips: bool = False
    """Whether logits are averaged over the image and its mirror images (so are the odds, geometrically)."""
    right_angles: bool = False
    """The same over its four right angles; with flips these are the eight symmetries of a square."""
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image of height×width."""

    size: tuple[int, int]
    """(height, width)."""
    strips: tuple[NDArray[np.uint8] | bytes, ...]
    """The mask's, from top to bottom; of a large image deflated, as long as the image itself is in memory."""
    areas: tuple[int, ...]
    """Pixels of each class."""
    confidence: float
    """Mean over the image, at the network's resolution, of the probability of the class that is the most probable."""
    probabilities: NDArray[Any] | None
    """None unless asked for. png: (height, width) uint16, 65535 · P(not background). npz: (C, height, width) float16 of
    each class. logits: (C, rows, columns) float16 of each class relative to background, at the network's resolution."""

    @cached_property
    def mask(self) -> NDArray[np.uint8]:
        """(height, width) class ids: probability above 0.5 of two classes, the most probable of several."""
        mask = np.empty(self.size, np.uint8)
        row = 0
        for strip in self.strips:
            rows = np.frombuffer(zlib_ng.decompress(strip), np.uint8) if isinstance(strip, bytes) else strip
            rows = rows.reshape(-1, mask.shape[1])
            mask[row : row + len(rows)] = rows
            row += len(rows)
        return mask


@dataclass(frozen=True)
class Predictor:
    network: nn.Module
    data: DataConfig
    device: torch.device
    settings: Settings
    identity: dict[str, Any]
    """Of the network: step and SHA-256 of its checkpoint."""

    @classmethod
    def of_run(
        cls,
        run: Path,
        device: torch.device,
        settings: Settings | None = None,
        checkpoint: str = "last",
        allow_import: bool = False,
        overrides: Sequence[str] = (),
    ) -> "Predictor":
        """The network of a run at its `checkpoint`: last, best or a step. Raises UserError.

        `overrides` of its config, `data.key=value`, apply to how images are read.
        """
        chosen = chosen_checkpoint(run, checkpoint)
        config, network = load_network(run, allow_import, chosen, overrides)
        step = int(chosen.name.removeprefix("step_"))
        identity = {"step": step, "sha256": digest_of_network(chosen)}
        return cls(network.to(device).eval(), config.data, device, settings or Settings(), identity)

    def read(self, path: Path) -> Canvas:
        """Raises BadFileError. Any thread may call it."""
        return Canvas(path, self.data.frame, self.data.decoding)

    def predict(self, canvases: Sequence[Canvas], probabilities: Probabilities = "none") -> Iterator[Prediction]:
        """Of each image in turn; at most `batch_size` of them unless they are cropped.

        Raises UserError where the network's output is not finite.
        """
        for canvas, bands in zip(canvases, self._bands(canvases), strict=True):
            yield self._assembled(canvas, bands, probabilities)

    def strips(self, canvases: Sequence[Canvas]) -> Iterator[Iterator[Tensor]]:
        """Of each image its logits in strips (C, rows, width) from top to bottom, at its own size."""
        for canvas, bands in zip(canvases, self._bands(canvases), strict=True):
            yield own_strips(bands, canvas.place, canvas.height, canvas.width)

    def _bands(self, canvases: Sequence[Canvas]) -> Iterator[Iterator[Tensor]]:
        """Of each image its logits in bands (C, rows, columns) of its canvas."""
        if self.data.shape == "crop":
            for canvas in canvases:
                yield self._tiled(canvas)
        elif canvases:
            for logits in self._logits(self._to_device([canvas.tile(0, 0) for canvas in canvases])):
                yield iter([logits])

    def _tiled(self, canvas: Canvas) -> Iterator[Tensor]:
        height, width = canvas.place.canvas

        def tile(top: int, left: int) -> Tensor:
            return torch.from_numpy(canvas.tile(top, left))

        def logits(tiles: Tensor) -> Tensor:
            return self._logits(tiles.to(self.device))

        size, overlap = self.data.image_size, self.data.overlap
        # What the network keeps of a tile is many times the tile.
        at_once = 1 if canvas.height * canvas.width >= LARGE and self.device.type == "cpu" else self.settings.batch_size
        yield from predict_bands(logits, tile, height, width, size, overlap, at_once)

    @torch.inference_mode()
    def _logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32, the mean over the symmetries that were asked for."""
        half = self.settings.precision == "bf16"
        total: Tensor | None = None
        symmetries = _symmetries(self.settings)
        for there, back in symmetries:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                logits = back(self.network(there(images)))
            total = logits.float() if total is None else total + logits.float()
        assert total is not None
        return total / len(symmetries)

    def _to_device(self, tiles: Sequence[NDArray[np.float32]]) -> Tensor:
        return torch.from_numpy(np.stack(tiles)).to(self.device)

    @torch.inference_mode()
    def _assembled(self, canvas: Canvas, bands: Iterator[Tensor], probabilities: Probabilities) -> Prediction:
        height, width = canvas.height, canvas.width
        strips: list[NDArray[np.uint8] | bytes] = []
        confidence = _Confidence(canvas.place)
        areas = np.zeros(self.data.class_count, np.int64)
        kept: NDArray[Any] | None = None
        pictures: list[Tensor] = []
        row = 0
        watched = confidence.watched(bands, pictures if probabilities == "logits" else None)
        for strip in own_strips(watched, canvas.place, height, width):
            ids = (strip[0] > 0).view(torch.uint8) if len(strip) == 1 else strip.argmax(dim=0).byte()
            rows = slice(row, row + strip.shape[1])
            mask = ids.cpu().numpy()
            strips.append(zlib_ng.compress(mask.tobytes(), 1) if height * width >= LARGE else mask)
            areas += _histogram(mask, len(areas))
            if probabilities == "png":
                kept = np.empty((height, width), np.uint16) if kept is None else kept
                kept[rows] = (_foreground(strip).double() * 65535).round().int().cpu().numpy()
            elif probabilities == "npz":
                each = _by_class(strip).half().cpu().numpy()
                kept = np.empty((len(each), height, width), np.float16) if kept is None else kept
                kept[:, rows] = each
            row = rows.stop
        if probabilities == "logits":
            kept = relative_logits(torch.cat(pictures, dim=1)[None])[0].half().cpu().numpy()
        return Prediction((height, width), tuple(strips), tuple(areas.tolist()), confidence.mean, kept)


class _Confidence:
    """The mean probability of the most probable class over an image's picture, of bands of its canvas."""

    def __init__(self, place: Placement) -> None:
        self._place = place
        self._sum = 0.0

    def watched(self, bands: Iterator[Tensor], kept: list[Tensor] | None) -> Iterator[Tensor]:
        """The bands as they are; `kept` gets what the picture has of each."""
        rows, columns = self._place.picture
        row = 0
        for band in bands:
            part = band[:, max(rows.start - row, 0) : max(rows.stop - row, 0), columns]
            best = part[0].abs().sigmoid() if len(part) == 1 else part.softmax(dim=0).amax(dim=0)
            self._sum += best.sum(dtype=torch.float64).item()
            row += band.shape[1]
            if kept is not None:
                kept.append(part)
            yield band

    @property
    def mean(self) -> float:
        mean = self._sum / (self._place.height * self._place.width)
        if not math.isfinite(mean):
            raise UserError("the network's output is not finite: its training has diverged; choose another checkpoint")
        return mean


def _foreground(logits: Tensor) -> Tensor:
    """(rows, width) of (C, rows, width)."""
    return logits[0].sigmoid() if len(logits) == 1 else 1 - logits.softmax(dim=0)[0]


def _by_class(logits: Tensor) -> Tensor:
    """(classes, rows, width), background first."""
    if len(logits) > 1:
        return logits.softmax(dim=0)
    return torch.cat([(-logits).sigmoid(), logits.sigmoid()])


def _histogram(ids: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    if count > 2:
        return np.bincount(ids.ravel(), minlength=count)
    foreground = np.count_nonzero(ids)  # in a fortieth of bincount's time
    return np.array([ids.size - foreground, foreground])


_Map = Callable[[Tensor], Tensor]


def _symmetries(settings: Settings) -> list[tuple[_Map, _Map]]:
    """Each symmetry of (…, H, W) that was asked for, and its inverse."""
    turns = range(4) if settings.right_angles else range(1)
    mirrors: list[tuple[int, ...]] = [()]
    if settings.flips:
        # With the right angles, one mirror image makes all eight.
        mirrors = [(), (-1,)] if settings.right_angles else [(), (-1,), (-2,), (-2, -1)]
    return [(partial(_turn, turn, mirror), partial(_turn_back, turn, mirror)) for turn in turns for mirror in mirrors]


def _turn(turns: int, mirror: tuple[int, ...], images: Tensor) -> Tensor:
    return torch.rot90(images.flip(mirror), turns, (-2, -1)) if mirror or turns else images


def _turn_back(turns: int, mirror: tuple[int, ...], images: Tensor) -> Tensor:
    return torch.rot90(images, -turns, (-2, -1)).flip(mirror) if mirror or turns else images
