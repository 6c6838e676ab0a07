"""The loader for machines without DALI: cv2 in a few threads, by the same contract and the same arithmetic.

Pixels are numpy's until a batch is whole: torch's operators would start a team of OpenMP threads in every thread that
calls them, and teams burn the cores that training and decoding need, waiting for the next operator.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distseg.data.augment import warp_elastically
from distseg.data.batch import Batch, Request
from distseg.data.classes import IGNORE
from distseg.data.geometry import Frame, cut
from distseg.data.reader import PixelReader, read_ahead


def load_batches(
    requests: Iterator[Sequence[Request]],
    reader: PixelReader,
    max_batch_size: int,
    device: torch.device,
    threads: int,
) -> Generator[Batch, None, None]:
    """One Batch per item of `requests`, in order, made ahead by `threads` threads; at most `max_batch_size` each.

    Raises BadFileError that names the file where one cannot be decoded. Closing the generator stops the threads.
    """
    batches = read_ahead(requests, lambda request: _load(request, reader), max_batch_size, threads)
    try:
        for batch, loaded in batches:
            yield _collate(batch, loaded, device)
    finally:
        batches.close()


Loaded = tuple[NDArray[np.float32], dict[Path, NDArray[np.uint8]]]


def _load(request: Request, reader: PixelReader) -> Loaded:
    """(3, H, W) float32 image, and (H, W) uint8 of each file of a mask."""
    frame = reader.frame
    masks = {path: _warped_mask(request, reader.mask(path), frame) for path in request.masks}
    return _warped_image(request, reader.image(request.image), frame), masks


def _warped_image(request: Request, canvas: NDArray[np.uint8], frame: Frame) -> NDArray[np.float32]:
    transform, fill = request.transform, frame.image_fill
    pixels = cut(canvas, request.window, frame.size)
    if transform.elastic is not None:
        pixels = warp_elastically(pixels, transform.elastic, cv2.INTER_LINEAR, fill)
    picture = _warp(pixels, transform.matrix, cv2.INTER_LINEAR, fill).astype(np.float32)
    if transform.hairs is not None:
        picture = picture * transform.hairs[..., None]
    if transform.blur is not None:
        side = 2 * math.ceil(3 * transform.blur) + 1
        deviation = max(float(transform.blur), 1e-3)
        picture = np.asarray(cv2.GaussianBlur(picture, (side, side), deviation), np.float32)
    coloured = np.asarray(cv2.transform(picture, transform.colour), np.float32)
    image = np.ascontiguousarray(coloured.transpose(2, 0, 1))
    return image if transform.grain is None else image + transform.grain


def _warped_mask(request: Request, canvas: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    mask, fill = cut(canvas, request.window, frame.size), (frame.mask_fill,)
    if request.transform.elastic is not None:
        mask = warp_elastically(mask, request.transform.elastic, cv2.INTER_NEAREST, fill)
    return _warp(mask, request.transform.matrix, cv2.INTER_NEAREST, fill)


def _warp(
    pixels: NDArray[np.uint8], matrix: NDArray[np.float32], interpolation: int, fill: tuple[int, ...]
) -> NDArray[np.uint8]:
    centred = matrix.astype(np.float64)
    centred[:, 2] += 0.5 * centred[:, :2].sum(axis=1) - 0.5  # cv2 puts the origin at the first pixel's centre
    size = pixels.shape[1::-1]
    warped = cv2.warpAffine(pixels, centred, size, flags=interpolation | cv2.WARP_INVERSE_MAP, borderValue=fill)
    return np.asarray(warped, np.uint8)


def _collate(batch: Sequence[Request], loaded: list[Loaded], device: torch.device) -> Batch:
    images, warped = zip(*loaded, strict=True)
    masks = _to_device([of[request.label] for request, of in zip(batch, warped, strict=True)], device)
    true_masks: Tensor | None = masks if batch[0].truth is not None else None
    if any(request.truth not in (None, request.label) for request in batch):
        true_masks = _to_device([of[request.truth] for request, of in zip(batch, warped, strict=True)], device)
    ids = tuple(request.id for request in batch)
    if batch[0].annotations is None:
        return Batch(_to_device(images, device), masks, true_masks, ids)
    annotations = [_annotations(request, of) for request, of in zip(batch, warped, strict=True)]
    annotators = _to_device([np.array(request.annotators, np.int64) for request in batch], device)
    return Batch(_to_device(images, device), masks, true_masks, ids, _to_device(annotations, device), annotators)


def _annotations(request: Request, warped: Mapping[Path, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(R, H, W), IGNORE where there are fewer."""
    stack = np.full((len(request.annotators), *warped[request.label].shape), IGNORE, np.uint8)
    for place, path in zip(stack, request.annotations or (), strict=False):
        place[:] = warped[path]
    return stack


def _to_device(arrays: Sequence[NDArray], device: torch.device) -> Tensor:
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else stacked
