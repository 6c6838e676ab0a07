"""The torch-facing operators, one name each, whatever serves the device: what they compute is said in reference.py.

Logits (B, C, H, W) in float16, bfloat16, float32 or float64, contiguous or channels-last; masks (B, H, W) integer class
ids, 255 = ignore. Maps are (B, H, W) and sums (B,) or (B, 5), float32 (float64 for float64 logits; the sums that come
with a map float64). All raise ValueError for shapes and dtypes that do not fit. None waits for the device.

A label that is neither a class id nor 255 is a ValueError on the CPU. A GPU is not waited for: there the loss, the
gradient and the alignment of such a pixel are NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distseg.ops import functions, reference
from distseg.ops.backends import backend, backend_name, raw_operators, using
from distseg.ops.reference import IGNORE, valid_pixels

__all__ = [
    "IGNORE",
    "alignment",
    "backend",
    "correct_labels",
    "dice_cross_entropy",
    "known_labels",
    "normalise",
    "pixel_loss",
    "positive_alignment",
    "positive_part",
    "signed_distance_bins",
    "using",
    "valid_pixels",
    "weighted_loss",
]

LARGEST_EDGE = 30
"""Of signed distances, in twentieths of the size: the squares of larger ones may not fit 32 bits."""


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy ℓ of each pixel, (B, H, W); differentiable twice, in reverse and in forward mode."""
    masks = _operand(logits, masks)
    if raw_operators(logits.device) is None:
        return reference.pixel_loss(logits, masks)
    return functions.PixelLoss.apply(logits, masks)


def weighted_loss(
    logits: Tensor,
    masks: Tensor,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    level: Tensor | None = None,
) -> Tensor:
    """Σ W·ℓ over every pixel, a scalar; differentiable twice in the logits and the weights, in either mode.

    A weight map may come as the operators of `distseg.meta` make it, W = scale·weights + level at valid pixels, with
    scale (B,) 1 and level (B,) 0 unless given; both are constants to autograd. Without `weights`, W = level.
    """
    masks = _operand(logits, masks)
    weights, scale, level = _weight_map(weights, scale, level, masks, _map_dtype(logits))
    if raw_operators(logits.device) is None:
        return reference.weighted_loss(logits, masks, weights, scale, level).sum()
    # A gradient in half precision is made in the backward, where a loss scaler's factor keeps it from underflow.
    with_gradient = logits.requires_grad and torch.is_grad_enabled() and logits.dtype != torch.float16
    return functions.WeightedLoss.apply(logits, masks, weights, scale, level, with_gradient)[0].sum()


def dice_cross_entropy(
    logits: Tensor,
    masks: Tensor,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    level: Tensor | None = None,
    *,
    dice: float = 0.5,
    smooth: float = 1e-5,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Σ W·[(1 − dice)·v·ℓ + dice·(1 − D)] over every pixel, a scalar: D is the soft Dice of the pixel's image under W.

    The weight map as in `weighted_loss`, ≥ 0; class_weights (max(2, C),) the v of each label, 1 unless given; `smooth`
    a share of the image's weight. The formula, and which classes D is a mean of, is in `reference.dice_cross_entropy`.
    Sums over images are all that crosses them, so that parts of a batch add up to the batch. Differentiable once, in
    the logits alone, in either mode; more raises RuntimeError (not under `reference`, which autograd differentiates).
    Raises ValueError for shapes that do not fit.
    """
    masks = _operand(logits, masks)
    dtype, classes = _map_dtype(logits), max(2, logits.shape[1])
    weights, scale, level = _weight_map(weights, scale, level, masks, dtype)
    if class_weights is None:
        class_weights = torch.ones(classes, dtype=dtype, device=masks.device)
    if class_weights.shape != (classes,):
        raise ValueError(f"class_weights {tuple(class_weights.shape)}: need one for each of {classes} classes")
    by_image = class_weights.to(dtype).expand(len(masks), classes).contiguous()
    if raw_operators(logits.device) is None:
        return reference.dice_cross_entropy(logits, masks, weights, scale, level, by_image, dice, smooth).sum()
    return functions.DiceCrossEntropy.apply(logits, masks, weights, scale, level, by_image, dice, smooth)[0].sum()


def alignment(logits: Tensor, tangents: Tensor, masks: Tensor) -> Tensor:
    """U = Σ_c ∂ℓ/∂z_c · ż_c of each pixel, (B, H, W); differentiable in reverse mode."""
    masks = _operand(logits, masks)
    if raw_operators(logits.device) is None:
        return reference.alignment(logits, tangents, masks)
    return functions.Alignment.apply(logits, tangents, masks)


def positive_alignment(logits: Tensor, tangents: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """`positive_part(alignment(…))` pixel by pixel, in one pass: W⁺ (B, H, W) and the sums (B, 5). Constants."""
    masks = _operand(logits, masks)
    if raw_operators(logits.device) is None:
        return reference.positive_alignment(logits.detach(), tangents.detach(), masks)
    return functions.Constant.apply("alignment", logits.device, logits, tangents, masks, True)


def positive_part(aligned: Tensor, masks: Tensor, cell: int = 1) -> tuple[Tensor, Tensor]:
    """W⁺ (B, H, W) of an alignment map over cell × cell patches, and the sums (B, 5). Constants to autograd."""
    masks = _labels(_map(aligned, masks, "alignment")[:, None], masks)
    if raw_operators(aligned.device) is None:
        return reference.positive_part(aligned.detach(), masks, cell)
    return functions.Constant.apply("positive_part", aligned.device, aligned, masks, cell)


def normalise(positive: Tensor | None, masks: Tensor, scale: Tensor, level: Tensor) -> Tensor:
    """The weight map W = scale·W⁺ + level at valid pixels, (B, H, W); scale, level (B,). Constant to autograd."""
    masks = _class_ids(masks)
    if raw_operators(masks.device) is None:
        return reference.normalise(positive, masks, scale, level)
    return functions.Constant.apply("normalise", masks.device, positive, masks, scale, level)


def signed_distance_bins(
    masks: Tensor, classes: int, outside: Sequence[int], inside: Sequence[int], area: int = 0
) -> Tensor:
    """The bin of each pixel of masks (N, H, W) by its signed distance to a contour, (N, H, W) uint8; 255 where ignored.

    classes, the background among them; outside, inside: the bins' edges, ascending twentieths of the size √A of the
    object, of at most LARGEST_EDGE; `area`, in pixels: that of every object in place of its own. The bins are in
    `reference.signed_distance_bins`, the same bits from every backend. Labels that are no class count as background.
    Raises ValueError for masks that do not fit, for other edges and areas, and where there are more bins than 255.
    """
    if masks.ndim != 3 or max(masks.shape[1:]) > reference.LONGEST_SIDE:
        raise ValueError(f"masks {tuple(masks.shape)}: need (N, H, W), at most {reference.LONGEST_SIDE} pixels a side")
    for edges in (outside, inside):
        if not edges or sorted({*edges}) != [*edges] or any(not 0 < edge <= LARGEST_EDGE for edge in edges):
            raise ValueError(f"edges {tuple(edges)}: need ascending twentieths, 1 to {LARGEST_EDGE}")
    count = len(outside) + 1 + (len(inside) + 1) * (classes - 1) + 1
    if classes < 2 or count > IGNORE:
        raise ValueError(f"{classes} classes have {count} bins: need 2 classes at least, and at most {IGNORE} bins")
    if not 0 <= area <= reference.LONGEST_SIDE**2:
        raise ValueError(f"area {area}: need 0 to {reference.LONGEST_SIDE**2} pixels")
    masks = _class_ids(masks)
    if raw_operators(masks.device) is None:
        return reference.signed_distance_bins(masks, classes, outside, inside, area)
    return functions.Constant.apply("signed_distance_bins", masks.device, masks, classes, [*outside], [*inside], area)


def correct_labels(
    logits: Tensor, masks: Tensor, bins: Tensor, annotators: Tensor, tables: Tensor, calibration: Tensor
) -> tuple[Tensor, Tensor]:
    """Each pixel's most probable class, given the network and what R annotators drew; and their expected counts.

    masks (B, H, W): a pixel counts unless it is 255 there. bins (B, R, H, W) uint8: where the pixel lies in each
    annotation (`signed_distance_bins`); what is no bin of the tables, 255 say, says nothing. annotators (B, R) integer:
    whose it is, −1 for no annotation. tables (A, K, M) floating: log P(bin | class) of each of A annotators, K =
    max(2, C). calibration (K,) floating: the scale a of the logits and the shifts b_1 … of the classes.

    Returns labels (B, H, W) like `masks` and counts (A, K, M) float64: how many pixels of each bin of each annotator
    are expected to be of each class. The formula is in `reference.correct_labels`. One pass; constants to autograd.
    Raises ValueError for shapes that do not fit, on the CPU also for a label that is no class and an unknown annotator.
    """
    masks = _operand(logits, masks)
    _check_annotations(masks, bins, annotators, tables)
    classes = max(2, logits.shape[1])
    if tables.shape[1] != classes or calibration.shape != (classes,):
        shapes = f"tables {tuple(tables.shape)} and calibration {tuple(calibration.shape)}"
        raise ValueError(f"{shapes}: need (A, {classes}, M) and ({classes},) for {classes} classes")
    dtype, annotators = _map_dtype(logits), annotators.long()
    given = masks, bins, annotators, tables.to(dtype), calibration.to(dtype)
    if raw_operators(logits.device) is None:
        labels, counts = reference.correct_labels(logits.detach(), *(each.detach() for each in given))
    else:
        labels, counts = functions.ConstantOfBatch.apply("correct_labels", logits.device, logits, *given)
    own = annotators == torch.arange(len(tables), device=annotators.device)[:, None, None]
    return labels, torch.where(own[..., None, None], counts, 0.0).sum((1, 2))


def known_labels(logits: Tensor, masks: Tensor) -> Tensor:
    """`masks` as uint8 or int64. Raises ValueError if they do not fit the logits, on the CPU also by what they hold."""
    masks = _labels(logits, masks)
    if masks.device.type == "cpu" and reference.unknown_labels(masks, logits.shape[1]).any():
        classes = max(2, logits.shape[1])
        raise ValueError(f"masks hold a label that is neither a class id below {classes} nor 255 (ignore)")
    return masks


def _operand(logits: Tensor, masks: Tensor) -> Tensor:
    """`known_labels`, but the C++ operators look at the labels as they go."""
    looks = backend_name(logits.device) == "csrc"
    return _labels(logits, masks) if looks else known_labels(logits, masks)


def _labels(logits: Tensor, masks: Tensor) -> Tensor:
    if logits.ndim != 4 or masks.shape != (logits.shape[0], *logits.shape[2:]):
        shapes = f"logits {tuple(logits.shape)} and masks {tuple(masks.shape)}"
        raise ValueError(f"{shapes}: need (B, C, H, W) and (B, H, W)")
    return _class_ids(masks)


def _class_ids(masks: Tensor) -> Tensor:
    if masks.is_floating_point() or masks.dtype == torch.bool:
        raise ValueError(f"masks are {masks.dtype}: need integer class ids, 255 = ignore")
    return masks if masks.dtype in (torch.uint8, torch.int64) else masks.long()


def _check_annotations(masks: Tensor, bins: Tensor, annotators: Tensor, tables: Tensor) -> None:
    if bins.shape != (len(masks), *bins.shape[1:2], *masks.shape[1:]) or bins.dtype != torch.uint8:
        given = f"bins {tuple(bins.shape)} {bins.dtype}"
        raise ValueError(f"{given}: need (B, R, H, W) uint8 for masks {tuple(masks.shape)}")
    if annotators.shape != bins.shape[:2] or annotators.is_floating_point():
        raise ValueError(f"annotators {tuple(annotators.shape)}: need (B, R) integer for bins {tuple(bins.shape)}")
    if tables.ndim != 3 or tables.shape[2] > IGNORE:
        raise ValueError(f"tables {tuple(tables.shape)}: need (A, K, M), M at most {IGNORE}")
    if not (bins.shape[1] and len(tables) and tables.shape[2]):
        raise ValueError(f"bins {tuple(bins.shape)} and tables {tuple(tables.shape)}: need R, A and M of at least 1")
    if annotators.device.type == "cpu" and not ((annotators >= -1) & (annotators < len(tables))).all():
        raise ValueError(f"annotators hold a number that is neither −1 nor below {len(tables)}")


def _weight_map(
    weights: Tensor | None, scale: Tensor | None, level: Tensor | None, masks: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    weights = None if weights is None else _map(weights, masks, "weights").to(dtype)
    scale = torch.ones(len(masks), dtype=dtype, device=masks.device) if scale is None else scale.to(dtype)
    level = torch.zeros(len(masks), dtype=dtype, device=masks.device) if level is None else level.to(dtype)
    return weights, scale, level


def _map(values: Tensor, masks: Tensor, name: str) -> Tensor:
    if values.shape != masks.shape:
        raise ValueError(f"{name} {tuple(values.shape)} and masks {tuple(masks.shape)}: need (B, H, W)")
    return values


def _map_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
