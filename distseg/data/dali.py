"""The loader on NVIDIA DALI: JPEG decoding and all pixel work on the GPU where there is one, else on the CPU.

Nothing in the pipeline is random: each sample comes with its matrix and its colour map (augment.py).
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from distseg.data.decode import check_image, check_mask
from distseg.data.streams import Batch, Request

# Per sample: image file, true mask file, label file, whether these two differ, geometry, colour.
_INPUT_TYPES = [types.UINT8, types.UINT8, types.UINT8, types.BOOL, types.FLOAT, types.FLOAT]
_INPUT_DIMENSIONS = [1, 1, 1, 0, 2, 2]


def load_batches(
    requests: Iterator[Sequence[Request]], image_size: int, max_batch_size: int, device: torch.device, threads: int
) -> Iterator[Batch]:
    """One Batch per item of `requests`, in order, decoded ahead; at most `max_batch_size` samples each.

    Raises UserError that names the file where one cannot be decoded. Closing the generator frees the pipeline.
    """
    on_gpu = device.type == "cuda"
    pending: deque[Sequence[Request]] = deque()  # what DALI has been given and has not returned, oldest first

    def feed() -> Iterator[tuple[list[NDArray], ...]]:
        for batch in requests:
            pending.append(batch)
            yield tuple(map(list, zip(*map(_inputs, batch), strict=True)))

    pipeline = _pipeline(
        feed,
        image_size,
        on_gpu,
        batch_size=max_batch_size,
        num_threads=threads,
        device_id=torch.empty(0, device=device).device.index if on_gpu else None,
        prefetch_queue_depth=2,
    )
    while True:
        # On a stream the outputs are ordered after DALI's work, with no wait on the host.
        stream = torch.cuda.current_stream(device) if on_gpu else None
        try:
            images, true_masks, labels = pipeline.run(stream)
        except StopIteration:
            return
        except RuntimeError:
            _raise_for_bad_file(pending)
            raise
        batch = pending.popleft()
        corrupted = any(request.label_file != request.sample.mask for request in batch)
        true = _to_torch(true_masks, device, stream)[..., 0]
        yield Batch(
            images=_to_torch(images, device, stream),
            masks=_to_torch(labels, device, stream)[..., 0] if corrupted else true,
            true_masks=true,
            ids=tuple(request.sample.id for request in batch),
        )


@pipeline_def(enable_conditionals=True)
def _pipeline(feed, size: int, on_gpu: bool):
    image_file, true_file, label_file, corrupted, matrix, colour = fn.external_source(
        feed, num_outputs=6, batch=True, cycle=None, dtype=_INPUT_TYPES, ndim=_INPUT_DIMENSIONS
    )

    def warp(pixels, interpolation):
        return fn.warp_affine(pixels, matrix=matrix, interp_type=interpolation, fill_value=0)

    def mask_of(file):
        # Only the CPU decodes PNG and BMP, and the small mask is the one to move.
        mask = fn.decoders.image(fn.io.file.read(file), device="cpu", output_type=types.GRAY, adjust_orientation=False)
        mask = fn.resize(mask, size=(size, size), interp_type=types.INTERP_NN)
        mask = fn.cast(mask > 0, dtype=types.UINT8)
        return warp(mask.gpu() if on_gpu else mask, types.INTERP_NN)

    image = fn.decoders.image(
        fn.io.file.read(image_file),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
    )
    image = fn.resize(image, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
    image = fn.transpose(fn.coord_transform(warp(image, types.INTERP_LINEAR), MT=colour), perm=[2, 0, 1])

    true = mask_of(true_file)
    label = true
    if corrupted:  # per sample: DALI runs the branch only where it is needed
        label = mask_of(label_file)
    return image, true, label


def _inputs(request: Request) -> tuple[NDArray, ...]:
    sample, transform = request.sample, request.transform
    files = (sample.image, sample.mask, request.label_file)
    corrupted = np.array(request.label_file != sample.mask)
    return (*map(_encode, files), corrupted, transform.matrix, transform.colour)


def _encode(path: Path) -> NDArray[np.uint8]:
    return np.frombuffer(os.fsencode(path), np.uint8)


def _to_torch(output, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    # Copied, because DALI reuses its buffers for the batches that follow.
    dense = output.as_tensor()
    dtype = torch.float32 if dense.dtype == types.FLOAT else torch.uint8
    return feed_ndarray(dense, torch.empty(dense.shape(), dtype=dtype, device=device), cuda_stream=stream)


def _raise_for_bad_file(pending: Iterable[Sequence[Request]]) -> None:
    """DALI's error does not say which file it met; read those in flight one by one."""
    for request in (request for batch in pending for request in batch):
        check_image(request.sample.image)
        check_mask(request.sample.mask)
        check_mask(request.label_file)
