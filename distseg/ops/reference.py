"""The operators in eager torch: the oracle, the fallback and the baseline of every faster backend.

Shapes: B images, C logit channels, H×W pixels. C = 1 is binary (class ids 0 and 1); C ≥ 2 is a softmax over class ids
0 … C − 1. Class id 255 marks a pixel that nobody vouches for: its loss, weight and alignment are 0, whatever its logit.
Where any other label stands, that is no class id, loss, gradient and alignment are NaN.

Logits may be in half precision: they are read as float32, and maps and sums are float32 (float64 for float64 logits).
Only the gradient in the logits has their own dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def valid_pixels(masks_BHW: Tensor) -> Tensor:
    """(B, H, W) bool: where the label counts."""
    return masks_BHW != IGNORE


def unknown_labels(masks_BHW: Tensor, channels: int) -> Tensor:
    """(B, H, W) bool: where a label is neither a class id nor 255."""
    return valid_pixels(masks_BHW) & ((masks_BHW < 0) | (masks_BHW >= max(2, channels)))


def pixel_loss(logits_BCHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """Cross-entropy of each pixel, (B, H, W); 0 at ignored pixels.

    C = 1: −y log σ(z) − (1 − y) log(1 − σ(z)).   C ≥ 2: −log softmax(z)_y.
    """
    logits, masks, valid = _without_ignored(logits_BCHW, masks_BHW)
    if logits.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], masks.to(logits.dtype), reduction="none")
    else:
        loss = F.cross_entropy(logits, masks.long(), reduction="none")
    return torch.where(valid, loss, 0.0)


def weighted_loss(
    logits_BCHW: Tensor, masks_BHW: Tensor, weights_BHW: Tensor | None, scale_B: Tensor, level_B: Tensor
) -> Tensor:
    """Σ_p (scale·W_p + level)·ℓ_p of each image over its valid pixels, (B,); W = 0 where there is no map."""
    loss = pixel_loss(logits_BCHW, masks_BHW)
    return (normalise(weights_BHW, masks_BHW, scale_B, level_B) * loss).sum((1, 2))


def dice_cross_entropy(
    logits_BCHW: Tensor,
    masks_BHW: Tensor,
    weights_BHW: Tensor | None,
    scale_B: Tensor,
    level_B: Tensor,
    class_weights_BK: Tensor,
    dice: float,
    smooth: float,
) -> Tensor:
    """Σ_p W_p [(1 − λ) v_y ℓ_p + λ (1 − D)] of each image, (B,): cross-entropy beside the soft Dice of that image.

    λ is `dice`, v the weights of the K = max(2, C) classes, W as in `weighted_loss`. The Dice is that of Milletari,
    Navab and Ahmadi 2016 without their squares, under the weights, and a mean over the foreground classes c that the
    image shows (Y_c > 0; class 1 alone where C = 1):

        D = mean_c (2 I_c + s M) / (P_c + Y_c + s M),     I_c = Σ W p_c [y = c],   P_c = Σ W p_c,   Y_c = Σ W [y = c]

    M = ΣW is the image's weight and s = `smooth`. An image that shows no foreground adds nothing to the Dice term.
    """
    logits, masks, valid = _without_ignored(logits_BCHW, masks_BHW)
    weights = normalise(weights_BHW, masks_BHW, scale_B, level_B)
    classes = torch.arange(1, class_weights_BK.shape[1], device=masks.device)[:, None, None]
    shown = ((masks[:, None] == classes) & valid[:, None]).to(logits.dtype)
    probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
    factors = class_weights_BK.gather(1, masks.flatten(1).long()).view_as(weights)
    mass = weights.sum((1, 2))
    both, predicted, labelled = (
        (weights[:, None] * part).sum((2, 3)) for part in (probabilities * shown, probabilities, shown)
    )
    counts = labelled > 0
    smoothed = smooth * mass[:, None]
    overlap = (2 * both + smoothed) / torch.where(counts, predicted + labelled + smoothed, 1.0)
    missed = torch.where(counts, 1 - overlap, 0.0).sum(1) / counts.sum(1).clamp(min=1)
    return (1 - dice) * (weights * factors * pixel_loss(logits_BCHW, masks_BHW)).sum((1, 2)) + dice * mass * missed


def alignment(logits_BCHW: Tensor, tangents_BCHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """U = Σ_c ∂ℓ/∂z_c · ż_c of each pixel, (B, H, W): how fast its loss grows along the tangent of the logits.

    C = 1: (σ(z) − y) ż.   C ≥ 2: Σ_c (softmax(z)_c − [c = y]) ż_c.   0 at ignored pixels.
    """
    logits, masks, valid = _without_ignored(logits_BCHW, masks_BHW)
    tangents = torch.where(valid[:, None], at_least_float32(tangents_BCHW), 0.0)
    if logits.shape[1] == 1:
        return ((torch.sigmoid(logits) - masks[:, None].to(logits.dtype)) * tangents)[:, 0]
    chosen = tangents.gather(1, masks.long()[:, None])[:, 0]
    return (torch.softmax(logits, dim=1) * tangents).sum(dim=1) - chosen


def positive_alignment(logits_BCHW: Tensor, tangents_BCHW: Tensor, masks_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """`positive_part` of `alignment`, pixel by pixel."""
    return positive_part(alignment(logits_BCHW, tangents_BCHW, masks_BHW), masks_BHW)


def positive_part(alignment_BHW: Tensor, masks_BHW: Tensor, cell: int = 1) -> tuple[Tensor, Tensor]:
    """W⁺ (B, H, W): U summed over the valid pixels of each cell × cell patch, clamped at 0, spread evenly over them.

    Patches start at the upper left; those at the right and lower edge are cut. With it come the sums (B, 5) float64
    of each image, from which every normaliser and diagnostic follows: ΣU, ΣW⁺, Σ(W⁺)², how many pixels are valid, and
    how many of these have W⁺ = 0.
    """
    valid = valid_pixels(masks_BHW)
    aligned = torch.where(valid, alignment_BHW, 0.0)
    if cell == 1:
        positive = aligned.clamp(min=0)
    else:
        height, width = aligned.shape[-2:]
        cell = max(1, min(cell, max(height, width)))  # a patch larger than the image is the image
        share = _patch_sums(aligned, cell).clamp(min=0) / _patch_sums(valid.to(aligned.dtype), cell).clamp(min=1)
        spread = share.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width]
        positive = torch.where(valid, spread, 0.0)
    numbers = (aligned, positive, positive.double().square(), valid, valid & (positive == 0))
    return positive, torch.stack([number.sum((1, 2), dtype=torch.float64) for number in numbers], dim=1)


def normalise(positive_BHW: Tensor | None, masks_BHW: Tensor, scale_B: Tensor, level_B: Tensor) -> Tensor:
    """The weight map W = scale·W⁺ + level at valid pixels, 0 at ignored ones, (B, H, W) in the dtype of the scales."""
    weights = level_B[:, None, None]
    if positive_BHW is not None:
        weights = scale_B[:, None, None] * positive_BHW + weights
    return torch.where(valid_pixels(masks_BHW), weights, 0.0)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _patch_sums(maps_BHW: Tensor, cell: int) -> Tensor:
    height, width = maps_BHW.shape[-2:]
    padded = F.pad(maps_BHW, (0, -width % cell, 0, -height % cell))
    return padded.unflatten(2, (-1, cell)).unflatten(1, (-1, cell)).sum((2, 4))


def _without_ignored(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Ignored pixels get logit 0 and class 0 before anything is computed, so that a NaN there reaches neither the value
    # nor, by 0 · NaN, the gradient.
    valid, unknown = valid_pixels(masks), unknown_labels(masks, logits.shape[1])
    known = torch.where(valid[:, None], at_least_float32(logits), 0.0)
    return torch.where(unknown[:, None], torch.nan, 0.0) + known, torch.where(valid & ~unknown, masks, 0), valid
