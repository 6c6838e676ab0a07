"""The operators in eager torch: the oracle, the fallback and the baseline of every faster backend.

Shapes: B images, C logit channels, H×W pixels. C = 1 is binary (class ids 0 and 1); C ≥ 2 is a softmax over class ids
0 … C − 1. Class id 255 marks a pixel that nobody vouches for: its loss, weight and alignment are 0, whatever its logit.
Where any other label stands, that is no class id, loss, gradient and alignment are NaN.

Logits may be in half precision: they are read as float32, and maps and sums are float32 (float64 for float64 logits).
Only the gradient in the logits has their own dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
LONGEST_SIDE = 16384
"""Of a mask, in pixels: squared distances fit 32 bits, and FAR is farther."""
FAR = 32767


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


def signed_distance_bins(
    masks_NHW: Tensor, classes: int, outside: Sequence[int], inside: Sequence[int], area: int = 0
) -> Tensor:
    """The bin of each pixel by its signed distance to a contour, (N, H, W) uint8; 255 where the mask is.

    A pixel's side is its class c where 1 ≤ c < classes, else 0, no object. d is the Euclidean distance to the nearest
    pixel of another side, d − 1/2 that to the contour, and A the area of all objects for side 0, of its own class for
    the others, or `area` for all if that is given. Edges e are in twentieths of the size √A, ascending. With n outside
    and m inside of them:

        side 0      how many outside edges have d − 1/2 < e/20·√A: 0 … n, n nearest to the contour
        side c      n + 1 + (m + 1)(c − 1), and how many inside edges have d − 1/2 > e/20·√A
        no object   n + 1 + (m + 1)(classes − 1) everywhere

    For integers D = d² the comparisons are exact, `squared_edges`, so every backend has the same bins.
    """
    sides = torch.where((masks_NHW > 0) & (masks_NHW < classes), masks_NHW, 0).long()
    squared = squared_distances(sides)
    areas = torch.stack([(sides == side).sum((1, 2)) for side in range(1, classes)], 1)
    nothing = (areas.sum(1) == 0)[:, None, None]
    every = areas.sum(1)
    if area:
        areas, every = torch.full_like(areas, area), torch.full_like(every, area)
    image = torch.arange(len(sides), device=sides.device)[:, None, None]
    bins = torch.where(sides > 0, len(outside) + 1 + (len(inside) + 1) * (sides - 1), 0)
    for edge in outside:
        bins = bins + ((sides == 0) & (squared <= squared_edges(every, edge, below=True)[image]))
    for edge in inside:
        bins = bins + ((sides > 0) & (squared > squared_edges(areas, edge)[image, (sides - 1).clamp(min=0)]))
    bins = torch.where(nothing, len(outside) + 1 + (len(inside) + 1) * (classes - 1), bins)
    return torch.where(valid_pixels(masks_NHW), bins, IGNORE).to(torch.uint8)


def squared_distances(sides_NHW: Tensor) -> Tensor:
    """D of each pixel to the nearest one of another value, (N, H, W) int64; FAR² and more where there is none.

    In two passes (Meijster, Roerdink and Hesselink 2000): the distance g to the nearest in the pixel's own row, then
    the least (y − v)² + g² in its column, where a pixel of another value has g = 0. At most LONGEST_SIDE pixels a side.
    """
    rows = torch.minimum(_distances_before(sides_NHW), _distances_before(sides_NHW.flip(2)).flip(2)).square()
    squared, height = rows, rows.shape[1]
    for step in range(1, height):
        if squared.device.type == "cpu" and not (squared > step * step).any():
            break  # nothing nearer is left; a GPU is not waited for
        upper, lower = (slice(None), slice(None, -step)), (slice(None), slice(step, None))
        same = sides_NHW[upper] == sides_NHW[lower]
        nearer = squared.clone()
        for own, other in ((upper, lower), (lower, upper)):
            nearer[own] = torch.minimum(nearer[own], step * step + torch.where(same, rows[other], 0))
        squared = nearer
    return squared


def squared_edges(areas: Tensor, edge: int, below: bool = False) -> Tensor:
    """The largest integer D of which √D − 1/2 ≤ edge/20·√A, int64 like the areas; `below`: < in place of ≤.

    That is 400 D ≤ edge² A + 100 + √(400 edge² A), in which the root of an integer may be rounded down: 400 D is one.
    """
    square = edge * edge * areas.long()
    return (_rounded_root((400 * square - int(below)).clamp(min=0)) + 100 + square) // 400


def correct_labels(
    logits_BCHW: Tensor,
    masks_BHW: Tensor,
    bins_BRHW: Tensor,
    annotators_BR: Tensor,
    tables_AKM: Tensor,
    calibration_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """The most probable class of each valid pixel, (B, H, W) like `masks`, and expected counts (B, R, K, M) float64.

        u_c = a (z_c − z_0) + b_c + Σ_r T_A(r)[c, m_r],     p = softmax(u),     counts_r[c, m] = Σ p_c [m_r = m]

    R annotations of an image say m_r, a bin < M; another, 255 say, says nothing and is not counted. What A(r) drew is
    weighed by table A(r), and by none where there is no such table. K = max(2, C) classes, of which one channel z has
    the logits (0, z); calibration a, b_1 … b_{K − 1}, and b_0 = 0. Sums are over valid pixels. Where u is not finite, a
    label stays as it was drawn, and what is counted is NaN. (Dawid and Skene 1979.)
    """
    logits, _, valid = _without_ignored(logits_BCHW, masks_BHW)
    relative = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits - logits[:, :1]
    scale, shift = calibration_K[0], torch.cat([torch.zeros_like(calibration_K[:1]), calibration_K[1:]])
    posterior = scale.to(logits.dtype) * relative + shift.to(logits.dtype)[:, None, None]
    bin_count = tables_AKM.shape[2]
    for annotators, bins in zip(annotators_BR.unbind(1), bins_BRHW.unbind(1), strict=True):
        says = (bins < bin_count) & ((annotators >= 0) & (annotators < len(tables_AKM)))[:, None, None]
        owner, known = torch.where(says, annotators[:, None, None], 0), torch.where(says, bins, 0).long()
        said = tables_AKM.to(logits.dtype).movedim(1, 2)[owner, known]
        posterior = posterior + torch.where(says[:, None], said.movedim(-1, 1), 0.0)
    probabilities = posterior.softmax(1)
    labels = torch.where(valid & probabilities.isfinite().all(1), posterior.argmax(1).to(masks_BHW.dtype), masks_BHW)
    counted = torch.where(valid[:, None], probabilities, 0.0)[:, None]
    # Bin by bin: a weighted bincount adds in no fixed order on a GPU, and a resumed run must give the same bits.
    columns = [
        torch.where((bins_BRHW == index)[:, :, None], counted, 0.0).sum((3, 4), dtype=torch.float64)
        for index in range(bin_count)
    ]
    return labels, torch.stack(columns, 3)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _distances_before(sides: Tensor) -> Tensor:
    """How far the last pixel of another value lies before each pixel of a row, FAR and more where there is none."""
    place = torch.arange(sides.shape[2], device=sides.device)
    changes = torch.full_like(sides, -FAR)
    changes[:, :, 1:] = torch.where(sides[:, :, 1:] != sides[:, :, :-1], place[1:], -FAR)
    return place - changes.cummax(2).values + 1


def _rounded_root(squares: Tensor) -> Tensor:
    """The roots of integers below 2^52, rounded down."""
    roots = squares.double().sqrt().long()
    roots = roots - (roots * roots > squares).long()
    return roots + ((roots + 1) * (roots + 1) <= squares).long()


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
