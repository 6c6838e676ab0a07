"""What the kernels share: where a program's pixels lie, and the loss of a pixel with its derivatives.

A program has BLOCK pixels of one image, numbered 0 … P − 1 through H×W. Where C ≥ 2 it has a (BLOCK, CPAD) tile of
their channels, CPAD the next power of two; strides tell contiguous (C, P) from channels-last (P, C), and the compiler
orders the lanes by them. Offsets are 64-bit. ACC is the dtype of all arithmetic.
"""

import triton
import triton.language as tl

IGNORE = tl.constexpr(255)


@triton.jit
def locate(pixels, blocks, BLOCK: tl.constexpr):
    """Image of this program, its pixels, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return image, pixel, pixel < pixels


@triton.jit
def read_valid(y_ptr, image, pixel, there, pixels):
    """Which pixels are valid."""
    return tl.load(y_ptr + image * pixels + pixel, mask=there, other=IGNORE) != IGNORE


@triton.jit
def read_classes(y_ptr, image, pixel, there, pixels, channels):
    """Labels as int32, which pixels are valid, and which of these have a label that is no class id."""
    label = tl.load(y_ptr + image * pixels + pixel, mask=there, other=IGNORE)
    valid = label != IGNORE
    unknown = valid & ((label < 0) | (label >= tl.maximum(channels, 2)))
    return label.to(tl.int32), valid, unknown


@triton.jit
def read_logits(z_ptr, offsets, there, valid, unknown, ACC: tl.constexpr):
    """Logits: 0 at ignored pixels whatever stands there, and NaN where the label is no class id."""
    z = tl.where(valid, tl.load(z_ptr + offsets, mask=there, other=0.0).to(ACC), 0.0)
    return tl.where(unknown, float("nan"), z)


@triton.jit
def read_map(map_ptr, image, pixel, valid, pixels):
    """A map's values, 0 at ignored pixels whatever stands there."""
    return tl.where(valid, tl.load(map_ptr + image * pixels + pixel, mask=valid, other=0.0), 0.0)


@triton.jit
def read_weights(w_ptr, scale_ptr, level_ptr, image, pixel, valid, pixels, HAS_MAP: tl.constexpr):
    """w̃ = scale·w + level at valid pixels, 0 at ignored ones; and scale."""
    scale, level = tl.load(scale_ptr + image), tl.load(level_ptr + image)
    weight = level
    if HAS_MAP:
        weight += scale * read_map(w_ptr, image, pixel, valid, pixels)
    return tl.where(valid, weight, 0.0), scale


@triton.jit
def read_class_weights(v_ptr, image, label, valid, unknown, channels):
    """The element of (B, max(2, C)) class weights that belongs to the label; 0 where there is none."""
    return tl.load(v_ptr + image * tl.maximum(channels, 2) + label, mask=valid & (unknown == 0), other=0.0)


@triton.jit
def tile_offsets(image, pixel, there, channels, pixels, stride_c, stride_p, CPAD: tl.constexpr):
    """Offsets (BLOCK, CPAD) of a tile of logits, which of them exist, and the channel numbers (1, CPAD)."""
    channel = tl.arange(0, CPAD)[None, :]
    offsets = image * channels * pixels + channel * stride_c + pixel[:, None] * stride_p
    return offsets, there[:, None] & (channel < channels), channel


@triton.jit
def binary(z, label, ACC: tl.constexpr):
    """ℓ, ∂ℓ/∂z and ∂²ℓ/∂z², with s = 1 − 2y: ℓ = softplus(s·z), ∂ℓ/∂z = s·σ(s·z). All exact near 0."""
    sign = (1 - 2 * label).to(ACC)
    against = sign * z
    e = tl.exp(-tl.abs(against))
    one_e = 1 + e
    # log(1 + e), made good for what 1 + e rounds away.
    rounded = one_e - 1
    log1p = tl.where(rounded == 0, e, tl.log(one_e) * (e / tl.where(rounded == 0, 1.0, rounded)))
    loss = tl.maximum(against, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p
    slope = sign * tl.where(against >= 0, 1.0, e) / one_e
    return loss, slope, e / (one_e * one_e)


@triton.jit
def softmax(z, label, channel, there):
    """ℓ (BLOCK,), softmax(z) and softmax(z) − onehot(y) (BLOCK, CPAD)."""
    z = tl.where(there, z, float("-inf"))
    most = tl.max(z, axis=1)[:, None]
    shifted = tl.where(there, z - most, float("-inf"))
    e = tl.exp(shifted)
    total = tl.sum(e, axis=1)
    chosen = channel == label[:, None]
    loss = tl.log(total) - tl.sum(tl.where(chosen & there, shifted, 0.0), axis=1)
    probability = e / total[:, None]
    return loss, probability, tl.where(chosen, probability - 1, probability)
