"""From alignment maps to weight maps: sum over cells, clamp, normalise over the global batch; and their diagnostics."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.meta.estimators import SumOverRanks
from distseg.ops import valid_pixels

GRADIENT_FLOOR = 1e-12
"""A clean gradient of a smaller norm has no direction to speak of: the map counts as zero."""

Diagnostics = dict[str, Tensor]


@dataclass(frozen=True)
class WeightRule:
    """How U becomes W. Raises ValueError for a word that it does not know.

    granularity: `pixel` (Mirikharaji et al. 2019), `patch(k)`, or `image` (Ren et al. 2018).
    normalise: `batch`, the whole global batch sums to 1; or `image`, each image sums to 1/B.
    on_zero: where nothing is left to normalise, `skip` gives weight 0 (the step then carries no data gradient) and
    `uniform` the same weight to every valid pixel. Under `image` normalisation the policy acts image by image.
    """

    granularity: str = "pixel"
    normalise: str = "batch"
    on_zero: str = "skip"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"pixel|image|patch\([1-9][0-9]*\)", self.granularity):
            raise ValueError(f"granularity {self.granularity!r}: pixel, patch(k) or image")
        if self.normalise not in ("batch", "image"):
            raise ValueError(f"normalise {self.normalise!r}: batch or image")
        if self.on_zero not in ("skip", "uniform"):
            raise ValueError(f"on_zero {self.on_zero!r}: skip or uniform")


def positive_part(alignment_BHW: Tensor, masks_BHW: Tensor, granularity: str) -> Tensor:
    """W⁺ (B, H, W): U summed over the valid pixels of each cell, clamped at 0, and spread evenly over them."""
    valid = valid_pixels(masks_BHW)
    aligned = torch.where(valid, alignment_BHW, 0.0)
    if granularity == "pixel":
        return aligned.clamp(min=0)
    height, width = aligned.shape[-2:]
    if granularity == "image":
        cell = (height, width)
    else:
        side = int(granularity.removeprefix("patch(").removesuffix(")"))
        cell = (min(side, height), min(side, width))

    def cell_sums(maps_BHW: Tensor) -> Tensor:
        return F.avg_pool2d(maps_BHW[:, None], cell, ceil_mode=True, divisor_override=1)[:, 0]

    share = cell_sums(aligned).clamp(min=0) / cell_sums(valid.to(aligned.dtype)).clamp(min=1)
    spread = share.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)[:, :height, :width]
    return torch.where(valid, spread, 0.0)


def weight_maps(
    alignments: Sequence[Tensor],
    masks: Sequence[Tensor],
    gradient_norm: Tensor,
    rule: WeightRule,
    sum_over_ranks: SumOverRanks,
    true_masks: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Diagnostics]:
    """The weight maps of a step's noisy micro-batches, each (B, H, W), and 0-dim diagnostics of the global batch.

    One reduction of eight numbers over the ranks; nothing leaves the device. Diagnostics: gradient_norm;
    effective_fraction 1 / (N ΣW²); zero_fraction of the N valid pixels; zero_maps, how often the policy acted; and
    with `true_masks` noise_rate, wrong_mass (the share of the weight on wrongly labelled pixels) and `auroc`.
    """
    # Without a direction U is noise. A NaN norm is not below the floor: it passes on, and shows in the loss.
    flat = gradient_norm <= GRADIENT_FLOOR
    positive = [
        positive_part(torch.where(flat, 0.0, u), m, rule.granularity) for u, m in zip(alignments, masks, strict=True)
    ]
    zero_images: Sequence[Tensor | None] = [None] * len(masks)
    if rule.normalise == "image":
        positive, zero_images = zip(
            *(_normalise_images(w, m, rule.on_zero) for w, m in zip(positive, masks, strict=True)), strict=True
        )

    truths: Sequence[Tensor | None] = true_masks or [None] * len(masks)
    local = sum(_sums(*columns) for columns in zip(positive, masks, truths, zero_images, strict=True))
    mass, squares, count, zeros, images, zero_maps, wrong_mass, wrong_count = sum_over_ranks(local).unbind()
    nothing = mass <= 0
    uniform = rule.on_zero == "uniform"

    if rule.normalise == "image":
        weights = [w / images.to(w.dtype) for w in positive]
    else:
        zero_maps = nothing
        level = (1 / count.clamp(min=1)) if uniform else torch.zeros_like(count)
        weights = [
            torch.where(nothing, valid_pixels(m) * level.to(w.dtype), w / torch.where(nothing, 1.0, mass).to(w.dtype))
            for w, m in zip(positive, masks, strict=True)
        ]

    diagnostics = {
        "gradient_norm": gradient_norm,
        "effective_fraction": torch.where(nothing, float(uniform), mass.square() / (count * squares)),
        "zero_fraction": torch.where(nothing, float(not uniform), zeros / count),
        "zero_maps": zero_maps.double(),
    }
    if true_masks is not None:
        noise_rate = wrong_count / count
        wrong_mass = torch.where(nothing, noise_rate if uniform else 0.0, wrong_mass / mass)
        diagnostics |= {"noise_rate": noise_rate, "wrong_mass": wrong_mass}
        diagnostics["auroc"] = auroc(sum_over_ranks(detection_histogram(alignments, masks, true_masks)))
    return weights, diagnostics


def uniform_weights(masks: Sequence[Tensor], sum_over_ranks: SumOverRanks, dtype: torch.dtype) -> list[Tensor]:
    """1/N on each of the N valid pixels of the global batch: the plain mean loss, written as weight maps."""
    valid = [valid_pixels(m) for m in masks]
    count = sum_over_ranks(sum(v.sum() for v in valid))
    return [v / count.clamp(min=1).to(dtype) for v in valid]


def detection_histogram(
    alignments: Sequence[Tensor], masks: Sequence[Tensor], true_masks: Sequence[Tensor]
) -> Tensor:
    """(2, 65536) int64: how many rightly (row 0) and wrongly (row 1) labelled pixels have each value of U in bfloat16.

    Histograms of ranks and micro-batches add up, so that a global AUROC costs one small reduction and no gathering.
    """
    counts = torch.zeros(2 * 65536 + 1, dtype=torch.int64, device=masks[0].device)
    for u, m, t in zip(alignments, masks, true_masks, strict=True):
        bits = u.to(torch.bfloat16).view(torch.int16).int()
        order = torch.where(bits >= 0, bits, -(bits + 32768)) + 32768  # the sign-magnitude bits as an ascending rank
        known = valid_pixels(m) & valid_pixels(t)
        bucket = torch.where(known, order + 65536 * (m != t), 2 * 65536).long().flatten()
        counts.scatter_add_(0, bucket, torch.ones_like(bucket))
    return counts[:-1].view(2, 65536)


def auroc(histogram: Tensor) -> Tensor:
    """Probability that a wrongly labelled pixel has a lower U than a rightly labelled one, ties half."""
    right, wrong = histogram.double()
    above = right.sum() - right.cumsum(0)
    return (wrong * (above + 0.5 * right)).sum() / (right.sum() * wrong.sum())


def _normalise_images(positive_BHW: Tensor, masks_BHW: Tensor, on_zero: str) -> tuple[Tensor, Tensor]:
    """Every image's map scaled to sum 1, the policy applied where it cannot be; and the number of those images."""
    valid = valid_pixels(masks_BHW).to(positive_BHW.dtype)
    total, count = positive_BHW.sum((1, 2), keepdim=True), valid.sum((1, 2), keepdim=True)
    nothing = (total <= 0) & (count > 0)
    fallback = valid / count.clamp(min=1) if on_zero == "uniform" else torch.zeros_like(positive_BHW)
    return torch.where(nothing, fallback, positive_BHW / torch.where(total <= 0, 1.0, total)), nothing.sum()


def _sums(positive: Tensor, masks: Tensor, true_masks: Tensor | None, zero_images: Tensor | None) -> Tensor:
    valid = valid_pixels(masks)
    wrong = torch.zeros_like(valid) if true_masks is None else valid & valid_pixels(true_masks) & (masks != true_masks)
    numbers = (
        positive.sum(dtype=torch.float64),
        torch.linalg.vector_norm(positive, dtype=torch.float64).square(),
        valid.sum(),
        (valid & (positive == 0)).sum(),
        positive.new_full((), len(positive)),
        positive.new_zeros(()) if zero_images is None else zero_images,
        (positive * wrong).sum(dtype=torch.float64),
        wrong.sum(),
    )
    return torch.stack([number.double() for number in numbers])
