"""The loader for machines without DALI: cv2 in a few threads, by the same contract and the same arithmetic."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from distseg.data.decode import read_image, read_mask
from distseg.data.streams import Batch, Request

_PREFETCHED_BATCHES = 2


def load_batches(
    requests: Iterator[Sequence[Request]], image_size: int, max_batch_size: int, device: torch.device, threads: int
) -> Iterator[Batch]:
    """One Batch per item of `requests`, in order, decoded ahead by `threads` threads; at most `max_batch_size` each.

    Raises UserError that names the file where one cannot be decoded. Closing the generator stops the threads.
    """
    pending: deque[list[Future]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="distseg-decode") as pool:
        try:
            while True:
                while len(pending) <= _PREFETCHED_BATCHES and (batch := next(requests, None)) is not None:
                    if len(batch) > max_batch_size:
                        raise ValueError(f"a batch of {len(batch)} where at most {max_batch_size} were announced")
                    pending.append([pool.submit(_load, request, image_size) for request in batch])
                if not pending:
                    return
                yield _collate([future.result() for future in pending.popleft()], device)
        finally:
            pool.shutdown(cancel_futures=True)


def _load(request: Request, size: int) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """(3, H, W) float32 image, (H, W) uint8 label and, where it is another file, true mask; and the id."""
    sample, transform = request.sample, request.transform
    image = _warp(_resize_image(read_image(sample.image), size), transform.matrix, cv2.INTER_LINEAR)
    colour = torch.from_numpy(transform.colour)
    pixels = torch.from_numpy(image).reshape(-1, 3).T.float()
    normalised = torch.addmm(colour[:, 3:], colour[:, :3], pixels).reshape(3, size, size)
    label = _load_mask(request.label_file, size, transform.matrix)
    true = None if request.label_file == sample.mask else _load_mask(sample.mask, size, transform.matrix)
    return normalised, label, true, sample.id


def _load_mask(path: Path, size: int, matrix: NDArray[np.float32]) -> Tensor:
    # INTER_NEAREST_EXACT takes the source pixel under the centre, as DALI does; INTER_NEAREST is half a pixel off.
    mask = cv2.resize(read_mask(path), (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    return torch.from_numpy(_warp(mask, matrix, cv2.INTER_NEAREST))


def _resize_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    # Triangle filter widened to the scale, as in DALI; cv2 has no antialiased linear filter.
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _warp(pixels: NDArray[np.uint8], matrix: NDArray[np.float32], interpolation: int) -> NDArray[np.uint8]:
    centred = matrix.astype(np.float64)
    centred[:, 2] += 0.5 * centred[:, :2].sum(axis=1) - 0.5  # cv2 puts the origin at the first pixel's centre
    size = pixels.shape[1::-1]
    return cv2.warpAffine(pixels, centred, size, flags=interpolation | cv2.WARP_INVERSE_MAP, borderValue=0)


def _collate(loaded: list[tuple[Tensor, Tensor, Tensor | None, str]], device: torch.device) -> Batch:
    images, labels, trues, ids = zip(*loaded, strict=True)
    masks = _to_device(labels, device)
    corrupted = any(true is not None for true in trues)
    true_masks = (
        _to_device([label if true is None else true for label, true in zip(labels, trues, strict=True)], device)
        if corrupted
        else masks
    )
    return Batch(_to_device(images, device), masks, true_masks, ids)


def _to_device(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    stacked = torch.stack(list(tensors))
    return stacked.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else stacked
