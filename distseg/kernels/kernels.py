"""The kernels: each one pass over its inputs, memory-bound, deterministic.

Sums are partial, one row per program, so that no atomic decides their order. Bytes per pixel in float32 with uint8
masks, C channels: alignment 8C + 5, pixel_loss 4C + 5, weighted_loss 8C + 5, double backward 12C + 9 (8C + 9 without
the cotangent of the logits), the sums of dice_cross_entropy 4C + 5 and its gradient 8C + 5, positive_part 9,
normalise 9.
"""

import triton
import triton.language as tl

from distseg.kernels.pixels import (
    IGNORE,
    binary,
    locate,
    read_class_weights,
    read_classes,
    read_logits,
    read_map,
    read_valid,
    read_weights,
    softmax,
    tile_offsets,
)


@triton.jit
def write_sums(sums_ptr, aligned, positive, valid, zero):
    """ΣU, ΣU⁺, Σ(U⁺)², valid pixels and those with U⁺ = 0, of this program."""
    row = sums_ptr + tl.program_id(0).to(tl.int64) * 5
    tl.store(row, tl.sum(aligned))
    tl.store(row + 1, tl.sum(positive))
    tl.store(row + 2, tl.sum(positive * positive))
    tl.store(row + 3, tl.sum(valid))
    tl.store(row + 4, tl.sum(zero))


@triton.jit
def alignment_kernel(
    z_ptr, t_ptr, y_ptr, map_ptr, sums_ptr, channels, pixels, blocks, stride_c, stride_p,
    CPAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    image, pixel, there = locate(pixels, blocks, BLOCK)
    label, valid, unknown = read_classes(y_ptr, image, pixel, there, pixels, channels)
    if CPAD == 1:
        at = image * pixels + pixel
        z = read_logits(z_ptr, at, there, valid, unknown, ACC)
        t = tl.where(valid, tl.load(t_ptr + at, mask=there, other=0.0).to(ACC), 0.0)
        _, slope, _ = binary(z, label, ACC)
        aligned = slope * t
    else:
        at, inside, channel = tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, CPAD)
        z = read_logits(z_ptr, at, inside, valid[:, None], unknown[:, None], ACC)
        t = tl.where(valid[:, None], tl.load(t_ptr + at, mask=inside, other=0.0).to(ACC), 0.0)
        _, _, residual = softmax(z, label, channel, channel < channels)
        aligned = tl.sum(residual * t, axis=1)
    positive = tl.maximum(aligned, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(map_ptr + image * pixels + pixel, positive if CLAMP else aligned, mask=there)
    write_sums(sums_ptr, aligned, positive, valid.to(ACC), (valid & (positive == 0)).to(ACC))


@triton.jit
def loss_kernel(
    z_ptr, y_ptr, w_ptr, scale_ptr, level_ptr, map_ptr, sums_ptr, gradient_ptr, channels, pixels, blocks,
    stride_c, stride_p,
    CPAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    WEIGHTED: tl.constexpr, HAS_MAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The map of ℓ, or, WEIGHTED, a partial sum of w̃·ℓ and, GRADIENT, w̃·∂ℓ/∂z."""
    image, pixel, there = locate(pixels, blocks, BLOCK)
    label, valid, unknown = read_classes(y_ptr, image, pixel, there, pixels, channels)
    if WEIGHTED:
        weight, _ = read_weights(w_ptr, scale_ptr, level_ptr, image, pixel, valid, pixels, HAS_MAP)
    if CPAD == 1:
        at = image * pixels + pixel
        z = read_logits(z_ptr, at, there, valid, unknown, ACC)
        loss, slope, _ = binary(z, label, ACC)
        if GRADIENT:
            tl.store(gradient_ptr + at, weight * slope, mask=there)
    else:
        at, inside, channel = tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, CPAD)
        z = read_logits(z_ptr, at, inside, valid[:, None], unknown[:, None], ACC)
        loss, _, residual = softmax(z, label, channel, channel < channels)
        if GRADIENT:
            tl.store(gradient_ptr + at, weight[:, None] * residual, mask=inside)
    if WEIGHTED:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64), tl.sum(weight * loss))
    else:
        tl.store(map_ptr + image * pixels + pixel, tl.where(valid, loss, 0.0), mask=there)


@triton.jit
def double_backward_kernel(
    z_ptr, y_ptr, w_ptr, scale_ptr, level_ptr, upstream_ptr, c_ptr, cot_z_ptr, cot_w_ptr, sums_ptr,
    channels, pixels, blocks, stride_c, stride_p,
    CPAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, HAS_MAP: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Cotangents of z and w, and a partial sum of that of upstream, for a cotangent c of upstream·w̃·∂ℓ/∂z."""
    image, pixel, there = locate(pixels, blocks, BLOCK)
    label, valid, unknown = read_classes(y_ptr, image, pixel, there, pixels, channels)
    weight, scale = read_weights(w_ptr, scale_ptr, level_ptr, image, pixel, valid, pixels, HAS_MAP)
    upstream = tl.load(upstream_ptr + image)
    if CPAD == 1:
        at = image * pixels + pixel
        z = read_logits(z_ptr, at, there, valid, unknown, ACC)
        c = tl.where(valid, tl.load(c_ptr + at, mask=there, other=0.0).to(ACC), 0.0)
        _, slope, curvature = binary(z, label, ACC)
        aligned = slope * c
        if LOGITS:
            tl.store(cot_z_ptr + at, upstream * weight * curvature * c, mask=there)
    else:
        at, inside, channel = tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, CPAD)
        z = read_logits(z_ptr, at, inside, valid[:, None], unknown[:, None], ACC)
        c = tl.where(valid[:, None], tl.load(c_ptr + at, mask=inside, other=0.0).to(ACC), 0.0)
        _, probability, residual = softmax(z, label, channel, channel < channels)
        aligned = tl.sum(residual * c, axis=1)
        if LOGITS:
            mean = tl.sum(probability * c, axis=1)[:, None]
            tl.store(cot_z_ptr + at, (upstream * weight)[:, None] * probability * (c - mean), mask=inside)
    tl.store(cot_w_ptr + image * pixels + pixel, upstream * scale * aligned, mask=there)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64), tl.sum(weight * aligned))


@triton.jit
def dice_sums_kernel(
    z_ptr, y_ptr, w_ptr, scale_ptr, level_ptr, v_ptr, sums_ptr, channels, pixels, blocks, stride_c, stride_p,
    CPAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, HAS_MAP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial sums over TILES tiles: w̃·v·ℓ, w̃, and of each channel w̃·p where it is the label, w̃·p, w̃ where it is."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    losses = tl.zeros((BLOCK,), dtype=ACC)
    masses = tl.zeros((BLOCK,), dtype=ACC)
    if CPAD == 1:
        both = tl.zeros((BLOCK,), dtype=ACC)
        predicted = tl.zeros((BLOCK,), dtype=ACC)
        labelled = tl.zeros((BLOCK,), dtype=ACC)
    else:
        both = tl.zeros((CPAD,), dtype=ACC)
        predicted = tl.zeros((CPAD,), dtype=ACC)
        labelled = tl.zeros((CPAD,), dtype=ACC)
    for tile in range(TILES):
        pixel = (program % blocks * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        there = pixel < pixels
        label, valid, unknown = read_classes(y_ptr, image, pixel, there, pixels, channels)
        weight, _ = read_weights(w_ptr, scale_ptr, level_ptr, image, pixel, valid, pixels, HAS_MAP)
        if CPAD == 1:
            z = read_logits(z_ptr, image * pixels + pixel, there, valid, unknown, ACC)
            loss, slope, _ = binary(z, label, ACC)
            probability = slope + label.to(ACC)
            lesion = (label == 1).to(ACC)
            both += weight * probability * lesion
            predicted += weight * probability
            labelled += weight * lesion
        else:
            at, inside, channel = tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, CPAD)
            z = read_logits(z_ptr, at, inside, valid[:, None], unknown[:, None], ACC)
            loss, probability, _ = softmax(z, label, channel, channel < channels)
            chosen = channel == label[:, None]
            both += tl.sum(tl.where(chosen, weight[:, None] * probability, 0.0), axis=0)
            predicted += tl.sum(weight[:, None] * probability, axis=0)
            labelled += tl.sum(tl.where(chosen, weight[:, None], 0.0), axis=0)
        losses += weight * read_class_weights(v_ptr, image, label, valid, unknown, channels) * loss
        masses += weight
    row = sums_ptr + program * (2 + 3 * channels)
    tl.store(row, tl.sum(losses))
    tl.store(row + 1, tl.sum(masses))
    if CPAD == 1:
        tl.store(row + 2, tl.sum(both))
        tl.store(row + 3, tl.sum(predicted))
        tl.store(row + 4, tl.sum(labelled))
    else:
        channel = tl.arange(0, CPAD)
        tl.store(row + 2 + channel, both, mask=channel < channels)
        tl.store(row + 2 + channels + channel, predicted, mask=channel < channels)
        tl.store(row + 2 + 2 * channels + channel, labelled, mask=channel < channels)


@triton.jit
def dice_gradient_kernel(
    z_ptr, y_ptr, w_ptr, scale_ptr, level_ptr, v_ptr, inside_ptr, outside_ptr, gradient_ptr, channels, pixels, blocks,
    stride_c, stride_p,
    CPAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """w̃·(v·∂ℓ/∂z + ∂p/∂z · slope), the slope in p being outside, and inside more where the channel is the label."""
    image, pixel, there = locate(pixels, blocks, BLOCK)
    label, valid, unknown = read_classes(y_ptr, image, pixel, there, pixels, channels)
    weight, _ = read_weights(w_ptr, scale_ptr, level_ptr, image, pixel, valid, pixels, HAS_MAP)
    factor = read_class_weights(v_ptr, image, label, valid, unknown, channels)
    if CPAD == 1:
        at = image * pixels + pixel
        z = read_logits(z_ptr, at, there, valid, unknown, ACC)
        _, residual, curvature = binary(z, label, ACC)
        slope = tl.load(outside_ptr + image) + tl.where(label == 1, tl.load(inside_ptr + image), 0.0)
        tl.store(gradient_ptr + at, weight * (factor * residual + slope * curvature), mask=there)
    else:
        at, exists, channel = tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, CPAD)
        z = read_logits(z_ptr, at, exists, valid[:, None], unknown[:, None], ACC)
        _, probability, residual = softmax(z, label, channel, channel < channels)
        of_class = image * channels + channel
        slope = tl.load(outside_ptr + of_class, mask=channel < channels, other=0.0)
        inside = tl.load(inside_ptr + of_class, mask=channel < channels, other=0.0)
        slope = slope + tl.where(channel == label[:, None], inside, 0.0)
        mean = tl.sum(probability * slope, axis=1)[:, None]
        change = factor[:, None] * residual + probability * (slope - mean)
        tl.store(gradient_ptr + at, weight[:, None] * change, mask=exists)


@triton.jit
def positive_kernel(
    u_ptr, y_ptr, map_ptr, sums_ptr, pixels, blocks, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    image, pixel, there = locate(pixels, blocks, BLOCK)
    valid = read_valid(y_ptr, image, pixel, there, pixels)
    aligned = read_map(u_ptr, image, pixel, valid, pixels)
    positive = tl.maximum(aligned, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(map_ptr + image * pixels + pixel, positive, mask=there)
    write_sums(sums_ptr, aligned, positive, valid.to(ACC), (valid & (positive == 0)).to(ACC))


@triton.jit
def patch_kernel(
    u_ptr, y_ptr, map_ptr, sums_ptr, height, width, cell, bands, groups,
    CELLS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """CELLS patches side by side: summed row by row, COLUMNS of each at a time, and written in a second sweep."""
    program = tl.program_id(0).to(tl.int64)
    group, band = program % groups, program // groups % bands
    image = program // (groups * bands)
    patch = group * CELLS + tl.arange(0, CELLS)[:, None]
    lane = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((CELLS,), dtype=ACC)
    count = tl.zeros((CELLS,), dtype=ACC)
    for step in range(cell * tl.cdiv(cell, COLUMNS)):
        row, column = band * cell + step % cell, step // cell * COLUMNS + lane
        there = (column < cell) & (patch * cell + column < width) & (row < height)
        at = (image * height + row) * width + patch * cell + column
        valid = tl.load(y_ptr + at, mask=there, other=IGNORE) != IGNORE
        total += tl.sum(tl.where(valid, tl.load(u_ptr + at, mask=there, other=0.0), 0.0), axis=1)
        count += tl.sum(valid.to(ACC), axis=1)
    share = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL) / tl.maximum(count, 1.0)
    for step in range(cell * tl.cdiv(cell, COLUMNS)):
        row, column = band * cell + step % cell, step // cell * COLUMNS + lane
        there = (column < cell) & (patch * cell + column < width) & (row < height)
        at = (image * height + row) * width + patch * cell + column
        valid = tl.load(y_ptr + at, mask=there, other=IGNORE) != IGNORE
        tl.store(map_ptr + at, tl.where(valid, share[:, None], 0.0), mask=there)
    sums = sums_ptr + program * 5
    tl.store(sums, tl.sum(total))
    tl.store(sums + 1, tl.sum(share * count))
    tl.store(sums + 2, tl.sum(share * share * count))
    tl.store(sums + 3, tl.sum(count))
    tl.store(sums + 4, tl.sum(tl.where(share == 0, count, 0.0)))


@triton.jit
def normalise_kernel(
    w_ptr, y_ptr, scale_ptr, level_ptr, map_ptr, pixels, blocks, BLOCK: tl.constexpr, HAS_MAP: tl.constexpr
):  # fmt: skip
    image, pixel, there = locate(pixels, blocks, BLOCK)
    valid = read_valid(y_ptr, image, pixel, there, pixels)
    weight, _ = read_weights(w_ptr, scale_ptr, level_ptr, image, pixel, valid, pixels, HAS_MAP)
    tl.store(map_ptr + image * pixels + pixel, weight, mask=there)


@triton.jit
def rescale_kernel(gradient_ptr, upstream_ptr, elements, blocks, BLOCK: tl.constexpr):
    """gradient *= upstream of its image, in place; nothing is read or written where that is 1."""
    image, element, there = locate(elements, blocks, BLOCK)
    upstream = tl.load(upstream_ptr + image)
    if upstream != 1.0:
        at = gradient_ptr + image * elements + element
        tl.store(at, tl.load(at, mask=there).to(upstream.dtype) * upstream, mask=there)
