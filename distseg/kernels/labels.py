"""The kernels of the label model: signed distance in two passes, and correction with its counts in one.

Bytes per pixel with uint8 masks: the distances along rows 1 read and 2 written, once forwards and once backwards, the
distances across them 3 and the bin 1, however often neighbours are read from the cache; correction in float32 of C
channels and R annotations 4C + R + 2.
"""

import triton
import triton.language as tl

from distseg.kernels.pixels import IGNORE, read_classes, read_logits, tile_offsets

FAR = tl.constexpr(32767)
"""More than the side of an image."""


@triton.jit
def read_sides(y_ptr, at, there, classes):
    """The class of an object, 0 where there is none."""
    label = tl.load(y_ptr + at, mask=there, other=0)
    return tl.where((label > 0) & (label < classes), label, 0).to(tl.int32)


@triton.jit
def largest(a, b):
    return tl.maximum(a, b)


@triton.jit
def least(a, b):
    return tl.minimum(a, b)


@triton.jit
def row_distances_kernel(
    y_ptr, g_ptr, areas_ptr, height, width, classes, bands,
    SIDES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g, the distance to the nearest pixel of another side in the same row, and the area of each side in these rows."""
    program = tl.program_id(0).to(tl.int64)
    image = program // bands
    row = program % bands * ROWS + tl.arange(0, ROWS)[:, None]
    lane, side_number = tl.arange(0, COLUMNS)[None, :], tl.arange(0, SIDES)
    area = tl.zeros((SIDES,), dtype=tl.int32)
    start = tl.full((ROWS,), -FAR, dtype=tl.int32)
    chunks = tl.cdiv(width, COLUMNS)
    for chunk in range(chunks):
        column = chunk * COLUMNS + lane
        there = (row < height) & (column < width)
        at = (image * height + row) * width + column
        side = read_sides(y_ptr, at, there, classes)
        before = read_sides(y_ptr, at - 1, there & (column > 0), classes)
        changes = tl.where(there & (column > 0) & (side != before), column, -FAR)
        starts = tl.maximum(tl.associative_scan(changes, 1, largest), start[:, None])
        tl.store(g_ptr + at, tl.minimum(column - starts + 1, FAR).to(tl.int16), mask=there)
        start = tl.max(starts, axis=1)
        for number in range(1, classes):
            count = tl.sum((side == number).to(tl.int32))
            area += tl.where(side_number == number, count, 0)
    tl.debug_barrier()
    end = tl.full((ROWS,), 2 * FAR, dtype=tl.int32)
    for turn in range(chunks):
        column = (chunks - 1 - turn) * COLUMNS + lane
        there = (row < height) & (column < width)
        at = (image * height + row) * width + column
        side = read_sides(y_ptr, at, there, classes)
        after = read_sides(y_ptr, at + 1, there & (column + 1 < width), classes)
        changes = tl.where(there & (column + 1 < width) & (side != after), column, 2 * FAR)
        ends = tl.minimum(tl.associative_scan(changes, 1, least, reverse=True), end[:, None])
        own = tl.load(g_ptr + at, mask=there, other=0).to(tl.int32)
        tl.store(g_ptr + at, tl.minimum(own, ends - column + 1).to(tl.int16), mask=there)
        end = tl.min(ends, axis=1)
    tl.store(areas_ptr + program * classes + side_number, area, mask=side_number < classes)


@triton.jit
def squared_edge(edge, area, BELOW: tl.constexpr):
    """The largest integer D of which √D − 1/2 ≤ edge/20·√area, or <, BELOW; reference.py says why."""
    square = edge * edge * area
    under = tl.maximum(400 * square - BELOW, 0)
    root = tl.sqrt(under.to(tl.float64)).to(tl.int64)
    root -= (root * root > under).to(tl.int64)
    root += ((root + 1) * (root + 1) <= under).to(tl.int64)
    return ((root + 100 + square) // 400).to(tl.int32)


@triton.jit
def edges_kernel(
    areas_ptr, edges_ptr, classes, bands, given,
    SIDES: tl.constexpr, OUTSIDE: tl.constexpr, INSIDE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Of an image: of each side its squared edges, and last whether there is an object. `given`: an area for all."""
    image = tl.program_id(0).to(tl.int64)
    side = tl.arange(0, SIDES)
    area = tl.zeros((SIDES,), dtype=tl.int64)
    for band in range(bands):
        area += tl.load(areas_ptr + (image * bands + band) * classes + side, mask=side < classes, other=0)
    every = tl.sum(area)
    objects = (every > 0).to(tl.int32)
    if given > 0:
        area, every = area * 0 + given, every * 0 + given
    own = edges_ptr + image * (classes + 1) * STRIDE
    for k in tl.static_range(len(OUTSIDE)):
        tl.store(own + k, squared_edge(OUTSIDE[k], every, 1))
    for k in tl.static_range(len(INSIDE)):
        at = own + side * STRIDE + k
        tl.store(at, squared_edge(INSIDE[k], area, 0), mask=(side > 0) & (side < classes))
    tl.store(own + classes * STRIDE, objects)


@triton.jit
def bins_kernel(
    y_ptr, g_ptr, edges_ptr, bins_ptr, height, width, classes, bands, groups,
    OUTSIDE: tl.constexpr, INSIDE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The least (y − v)² + g² over a tile's columns, in growing circles, and the bin that it lies in.

    Nothing is looked for beyond the last edge of a pixel's side: how far a program looks follows from its own tile.
    """
    program = tl.program_id(0).to(tl.int64)
    group, band = program % groups, program // groups % bands
    image = program // (groups * bands)
    row = band * ROWS + tl.arange(0, ROWS)[:, None]
    column = group * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < height) & (column < width)
    at = (image * height + row) * width + column
    label = tl.load(y_ptr + at, mask=there, other=0)
    side = tl.where((label > 0) & (label < classes), label, 0).to(tl.int32)
    edges = edges_ptr + image * (classes + 1) * STRIDE
    objects = tl.load(edges + classes * STRIDE)
    last = tl.load(edges + side * STRIDE + tl.where(side > 0, INSIDE, OUTSIDE) - 1)
    g = tl.load(g_ptr + at, mask=there, other=0).to(tl.int32)
    squared = tl.where(objects > 0, tl.minimum(g * g, last + 1), 0)
    step = 1
    while step * step < tl.max(squared):
        for turn in tl.static_range(2):
            other = row + (step if turn else -step)
            seen = there & (other >= 0) & (other < height)
            to = (image * height + other) * width + column
            beside = tl.load(g_ptr + to, mask=seen, other=FAR).to(tl.int32)
            height_there = tl.where(read_sides(y_ptr, to, seen, classes) == side, beside * beside, 0)
            squared = tl.where(seen, tl.minimum(squared, step * step + height_there), squared)
        step += 1
    bin = tl.where(side > 0, OUTSIDE + 1 + (INSIDE + 1) * (side - 1), 0)
    for k in tl.static_range(OUTSIDE):
        bin += ((side == 0) & (squared <= tl.load(edges + k))).to(tl.int32)
    for k in tl.static_range(INSIDE):
        edge = tl.load(edges + side * STRIDE + k, mask=side > 0, other=0)
        bin += ((side > 0) & (squared > edge)).to(tl.int32)
    bin = tl.where(objects > 0, bin, OUTSIDE + 1 + (INSIDE + 1) * (classes - 1))
    tl.store(bins_ptr + at, tl.where(label == IGNORE, IGNORE, bin).to(tl.uint8), mask=there)


@triton.jit
def correct_kernel(
    z_ptr, y_ptr, bins_ptr, annotators_ptr, tables_ptr, calibration_ptr, labels_ptr, counts_ptr,
    channels, pixels, blocks, stride_c, stride_p, tiles, annotations, tables, bin_count,
    KPAD: tl.constexpr, MPAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, ONE_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Labels, and partial counts of one annotation, over so many tiles of BLOCK pixels.

    A program counts for one annotation of its image, and reads what all of them say; that of the first writes labels.
    """
    program = tl.program_id(0).to(tl.int64)
    counted_for = program % annotations
    block, image = program // annotations % blocks, program // (annotations * blocks)
    classes = tl.maximum(channels, 2)
    number = tl.arange(0, KPAD)[None, :]
    scale = tl.load(calibration_ptr)
    shift = tl.load(calibration_ptr + number, mask=(number > 0) & (number < classes), other=0.0)
    counts = tl.zeros((BLOCK, KPAD, MPAD), dtype=ACC)
    for tile in range(tiles):
        pixel = (block * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        there = pixel < pixels
        _, valid, unknown = read_classes(y_ptr, image, pixel, there, pixels, channels)
        if ONE_CHANNEL:
            z = read_logits(z_ptr, image * pixels + pixel, there, valid, unknown, ACC)
            relative = tl.where(number == 1, z[:, None], 0.0)
        else:
            at, inside, _ = tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, KPAD)
            first = image * channels * pixels + pixel * stride_p
            z = read_logits(z_ptr, at, inside, valid[:, None], unknown[:, None], ACC)
            relative = z - read_logits(z_ptr, first, there, valid, unknown, ACC)[:, None]
        posterior = scale * relative + shift
        for annotation in range(annotations):
            of_image = image * annotations + annotation
            bin = tl.load(bins_ptr + of_image * pixels + pixel, mask=there, other=IGNORE).to(tl.int32)
            annotator = tl.load(annotators_ptr + of_image)
            says = (bin < bin_count) & (annotator >= 0) & (annotator < tables)
            at = (annotator * classes + number) * bin_count + bin[:, None]
            posterior += tl.load(tables_ptr + at, mask=says[:, None] & (number < classes), other=0.0)
        posterior = tl.where(number < classes, posterior, float("-inf"))
        e = tl.exp(posterior - tl.max(posterior, axis=1)[:, None])
        total = tl.sum(e, axis=1)
        drawn = tl.load(y_ptr + image * pixels + pixel, mask=there, other=IGNORE)
        best = tl.argmax(posterior, axis=1).to(drawn.dtype)
        if counted_for == 0:
            out = tl.where(valid & (total == total), best, drawn)
            tl.store(labels_ptr + image * pixels + pixel, out, mask=there)
        probability = tl.where(valid[:, None], e / total[:, None], 0.0)
        at = (image * annotations + counted_for) * pixels + pixel
        bin = tl.load(bins_ptr + at, mask=there, other=IGNORE).to(tl.int32)
        here = bin[:, None, None] == tl.arange(0, MPAD)[None, None, :]
        counts += tl.where(here, probability[:, :, None], 0.0)
    row, column = tl.arange(0, KPAD)[:, None], tl.arange(0, MPAD)[None, :]
    own = counts_ptr + ((image * blocks + block) * annotations + counted_for) * classes * bin_count
    at = own + row * bin_count + column
    tl.store(at, tl.sum(counts, axis=0), mask=(row < classes) & (column < bin_count))
