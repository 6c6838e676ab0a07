"""The raw operators on CUDA, in Triton: the same names, arguments and results as `torch.ops.distseg` has on the CPU.

What they compute is said in distseg/ops/reference.py. Tensors are on one device, of the shapes and dtypes that
distseg/ops checks. Nothing here waits for the device.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distseg.kernels import kernels
from distseg.kernels.kernels import (
    alignment_kernel,
    dice_gradient_kernel,
    dice_sums_kernel,
    double_backward_kernel,
    loss_kernel,
    normalise_kernel,
    patch_kernel,
    positive_kernel,
    rescale_kernel,
)
from distseg.kernels.labels import bins_kernel, correct_kernel, edges_kernel, row_distances_kernel

__all__ = [
    "alignment",
    "correct_labels",
    "dice_cross_entropy_gradient",
    "dice_cross_entropy_sums",
    "kernels",
    "normalise",
    "pixel_loss",
    "positive_part",
    "rescale_",
    "signed_distance_bins",
    "weighted_loss",
    "weighted_loss_double_backward",
]

TILE = 1024
"""Elements of a program's tile of logits: 8 for each of 128 threads."""
BLOCK = 1024
"""Pixels of a program that reads maps alone."""
PIXELS_OF_SUMS = 128
"""Pixels, at least, of a program that sums over every channel."""
COUNTERS = 4096
"""Of a program that counts, in its registers: one for each of a few pixels, classes and bins."""
PIXELS_OF_COUNTS = 1024
PIXELS_A_COUNT = 4
"""Pixels, at least, of such a program, in all and for each number that it leaves behind."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def alignment(logits: Tensor, tangents: Tensor, masks: Tensor, clamp: bool) -> tuple[Tensor, Tensor]:
    z, layout = _dense(logits)
    t, y = _like(tangents, z), masks.contiguous()
    mapped, sums = _new_map(z), _new_sums(z, layout.blocks, 5)
    if layout.programs:
        with _device_of(z):
            alignment_kernel[(layout.programs,)](
                z, t, y, mapped, sums, *layout.sizes, **layout.constants, CLAMP=clamp, **OPTIONS
            )
    return mapped, sums.sum(1, dtype=torch.float64)


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    z, layout = _dense(logits)
    y, mapped = masks.contiguous(), _new_map(z)
    if layout.programs:
        with _device_of(z):
            loss_kernel[(layout.programs,)](
                z, y, y, y, y, mapped, mapped, z, *layout.sizes, **layout.constants,
                WEIGHTED=False, HAS_MAP=False, GRADIENT=False, **OPTIONS,
            )  # fmt: skip
    return mapped


def weighted_loss(
    logits: Tensor, masks: Tensor, weights: Tensor | None, scale: Tensor, level: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    z, layout = _dense(logits)
    y, w = masks.contiguous(), None if weights is None else weights.contiguous()
    sums = _new_sums(z, layout.blocks, 1)
    dz = torch.empty_like(z) if gradient else z.new_empty(0)
    if layout.programs:
        with _device_of(z):
            loss_kernel[(layout.programs,)](
                z, y, scale if w is None else w, scale.contiguous(), level.contiguous(), sums, sums, dz,
                *layout.sizes, **layout.constants, WEIGHTED=True, HAS_MAP=w is not None, GRADIENT=gradient, **OPTIONS,
            )  # fmt: skip
    return sums.sum((1, 2), dtype=torch.float64).to(sums.dtype), dz


def weighted_loss_double_backward(
    logits: Tensor,
    masks: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    level: Tensor,
    upstream: Tensor,
    cotangent: Tensor,
    for_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z, layout = _dense(logits)
    c, y, w = _like(cotangent, z), masks.contiguous(), None if weights is None else weights.contiguous()
    cot_z = torch.empty_like(z) if for_logits else z.new_empty(0)
    cot_w, sums = _new_map(z), _new_sums(z, layout.blocks, 1)
    if layout.programs:
        with _device_of(z):
            double_backward_kernel[(layout.programs,)](
                z, y, scale if w is None else w, scale.contiguous(), level.contiguous(), upstream.contiguous(), c,
                cot_z, cot_w, sums, *layout.sizes, **layout.constants, HAS_MAP=w is not None, LOGITS=for_logits,
                **OPTIONS,
            )  # fmt: skip
    return cot_z, cot_w, sums.sum((1, 2), dtype=torch.float64).to(sums.dtype)


def dice_cross_entropy_sums(
    logits: Tensor, masks: Tensor, weights: Tensor | None, scale: Tensor, level: Tensor, class_weights: Tensor
) -> Tensor:
    z, layout = _dense(logits)
    y, w = masks.contiguous(), None if weights is None else weights.contiguous()
    # The sums of many channels are few beside the logits of many pixels only.
    tiles = max(1, PIXELS_OF_SUMS // layout.constants["BLOCK"])
    channels, pixels, blocks, *strides = layout.sizes
    programs = triton.cdiv(blocks, tiles)
    sums = _new_sums(z, programs, 2 + 3 * channels)
    if layout.programs:
        with _device_of(z):
            dice_sums_kernel[(len(z) * programs,)](
                z, y, scale if w is None else w, scale.contiguous(), level.contiguous(), class_weights.contiguous(),
                sums, channels, pixels, programs, *strides, **layout.constants, HAS_MAP=w is not None, TILES=tiles,
                **OPTIONS,
            )  # fmt: skip
    return sums.sum(1, dtype=torch.float64)


def dice_cross_entropy_gradient(
    logits: Tensor,
    masks: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    level: Tensor,
    class_weights: Tensor,
    inside: Tensor,
    outside: Tensor,
) -> Tensor:
    z, layout = _dense(logits)
    y, w = masks.contiguous(), None if weights is None else weights.contiguous()
    dz = torch.empty_like(z)
    if layout.programs:
        with _device_of(z):
            dice_gradient_kernel[(layout.programs,)](
                z, y, scale if w is None else w, scale.contiguous(), level.contiguous(), class_weights.contiguous(),
                inside.contiguous(), outside.contiguous(), dz, *layout.sizes, **layout.constants,
                HAS_MAP=w is not None, **OPTIONS,
            )  # fmt: skip
    return dz


def positive_part(aligned: Tensor, masks: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    u, y = aligned.contiguous(), masks.contiguous()
    batch, height, width = u.shape
    mapped, acc = torch.empty_like(u), _acc(u.dtype)
    if cell == 1:
        blocks = triton.cdiv(height * width, BLOCK)
        sums = _new_sums(u, blocks, 5)
        if batch * blocks:
            with _device_of(u):
                positive_kernel[(batch * blocks,)](
                    u, y, mapped, sums, height * width, blocks, BLOCK=BLOCK, ACC=acc, **OPTIONS
                )
        return mapped, sums.sum(1, dtype=torch.float64)
    # A patch larger than the image is the image.
    cell = min(cell, max(height, width, 1))
    columns = min(triton.next_power_of_2(cell), 128)
    cells = BLOCK // columns
    bands, groups = triton.cdiv(height, cell), triton.cdiv(triton.cdiv(width, cell), cells)
    sums = _new_sums(u, bands * groups, 5)
    if batch * bands * groups:
        with _device_of(u):
            patch_kernel[(batch * bands * groups,)](
                u, y, mapped, sums, height, width, cell, bands, groups,
                CELLS=cells, COLUMNS=columns, ACC=acc, **OPTIONS,
            )  # fmt: skip
    return mapped, sums.sum(1, dtype=torch.float64)


def normalise(positive: Tensor | None, masks: Tensor, scale: Tensor, level: Tensor) -> Tensor:
    w, y = None if positive is None else positive.contiguous(), masks.contiguous()
    batch, pixels = y.shape[0], y.shape[1] * y.shape[2]
    mapped = torch.empty(y.shape, dtype=scale.dtype, device=y.device)
    blocks = triton.cdiv(pixels, BLOCK)
    if batch * blocks:
        with _device_of(y):
            normalise_kernel[(batch * blocks,)](
                scale if w is None else w, y, scale.contiguous(), level.contiguous(), mapped, pixels, blocks,
                BLOCK=BLOCK, HAS_MAP=w is not None, **OPTIONS,
            )  # fmt: skip
    return mapped


def signed_distance_bins(masks: Tensor, classes: int, outside: list[int], inside: list[int], area: int = 0) -> Tensor:
    y = masks.contiguous()
    images, height, width = y.shape
    bins = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    if not y.numel():
        return bins
    columns = min(triton.next_power_of_2(width), TILE // 2)
    rows, sides = TILE // columns, triton.next_power_of_2(classes)
    bands = triton.cdiv(height, rows)
    g = torch.empty(y.shape, dtype=torch.int16, device=y.device)
    areas = torch.empty((images, bands, classes), dtype=torch.int32, device=y.device)
    # Of each side as many edges as there are at most, and in one more row whether there is an object.
    stride = max(len(outside), len(inside))
    edges = torch.empty((images, classes + 1, stride), dtype=torch.int32, device=y.device)
    constants = {"OUTSIDE": len(outside), "INSIDE": len(inside), "STRIDE": stride}
    tile_rows, tile_columns = 16, 64
    tile_bands, groups = triton.cdiv(height, tile_rows), triton.cdiv(width, tile_columns)
    with _device_of(y):
        row_distances_kernel[(images * bands,)](
            y, g, areas, height, width, classes, bands, SIDES=sides, ROWS=rows, COLUMNS=columns, **OPTIONS
        )
        edges_kernel[(images,)](
            areas, edges, classes, bands, area,
            SIDES=sides, OUTSIDE=tuple(outside), INSIDE=tuple(inside), STRIDE=stride, **OPTIONS,
        )  # fmt: skip
        bins_kernel[(images * tile_bands * groups,)](
            y, g, edges, bins, height, width, classes, tile_bands, groups,
            **constants, ROWS=tile_rows, COLUMNS=tile_columns, **OPTIONS,
        )  # fmt: skip
    return bins


def correct_labels(
    logits: Tensor, masks: Tensor, bins: Tensor, annotators: Tensor, tables: Tensor, calibration: Tensor
) -> tuple[Tensor, Tensor]:
    z, layout = _dense(logits)
    y, annotations, bin_count = masks.contiguous(), bins.shape[1], tables.shape[2]
    channels, pixels, _, *strides = layout.sizes
    classes = tables.shape[1]
    padded, bins_padded = triton.next_power_of_2(classes), triton.next_power_of_2(bin_count)
    block = max(1, COUNTERS // (padded * bins_padded))
    most = min(pixels, max(PIXELS_OF_COUNTS, PIXELS_A_COUNT * classes * bin_count))
    tiles = triton.cdiv(most, block)
    blocks = triton.cdiv(pixels, tiles * block) if pixels else 0
    # 32 counters a thread, and 4 to 16 warps, so that none is spilled to memory.
    warps = min(16, max(OPTIONS["num_warps"], padded * bins_padded // 1024))
    labels = torch.empty_like(y)
    counts = torch.empty((len(z), blocks, annotations, classes, bin_count), dtype=tables.dtype, device=z.device)
    if counts.numel():
        with _device_of(z):
            correct_kernel[(len(z) * blocks * annotations,)](
                z, y, bins.contiguous(), annotators.contiguous(), tables.contiguous(), calibration.contiguous(),
                labels, counts, channels, pixels, blocks, *strides, tiles, annotations, len(tables), bin_count,
                KPAD=padded, MPAD=bins_padded, BLOCK=block, ACC=_acc(z.dtype), ONE_CHANNEL=channels == 1,
                **OPTIONS | {"num_warps": warps},
            )  # fmt: skip
    return labels, counts.sum(1, dtype=torch.float64)


def rescale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply each image of `gradient`, dense and nobody else's yet, by its element of `upstream` (B,), in place.

    Autograd does not see it. An upstream of 1, that of a loss that nothing multiplied, costs no memory traffic.
    """
    elements = gradient[0].numel() if len(gradient) else 0
    blocks = triton.cdiv(elements, TILE)
    if blocks:
        with _device_of(gradient):
            rescale_kernel[(len(gradient) * blocks,)](
                gradient, upstream.contiguous(), elements, blocks, BLOCK=TILE, **OPTIONS
            )
    return gradient


class _Layout:
    """How the programs of a launch share the pixels of dense logits."""

    def __init__(self, z: Tensor) -> None:
        batch, channels, height, width = z.shape
        pixels = height * width
        padded = triton.next_power_of_2(channels)
        block = max(1, TILE // padded)
        self.blocks = triton.cdiv(pixels, block)
        self.programs = batch * self.blocks
        last = channels > 1 and not z.is_contiguous()
        stride_c, stride_p = (1, channels) if last else (pixels, 1)
        self.sizes = (channels, pixels, self.blocks, stride_c, stride_p)
        self.constants = {"CPAD": padded, "BLOCK": block, "ACC": _acc(z.dtype)}


def _dense(logits: Tensor) -> tuple[Tensor, _Layout]:
    if logits.shape[1] == 1 or not logits.is_contiguous(memory_format=torch.channels_last):
        logits = logits.contiguous()
    return logits, _Layout(logits)


def _like(tensor: Tensor, z: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.contiguous_format if z.is_contiguous() else torch.channels_last)


def _acc(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _new_map(z: Tensor) -> Tensor:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.empty((z.shape[0], *z.shape[2:]), dtype=dtype, device=z.device)


def _new_sums(like: Tensor, programs: int, count: int) -> Tensor:
    """(B, programs of an image, count) partial sums."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty((like.shape[0], programs, count), dtype=dtype, device=like.device)


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
