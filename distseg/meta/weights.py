"""From alignment maps to weight maps: sum over cells, clamp, normalise over the global batch; and their diagnostics."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distseg.meta.reduction import Reduction
from distseg.ops import normalise, positive_alignment, positive_part, valid_pixels

GRADIENT_FLOOR = 1e-12
"""A clean gradient of a smaller norm has no direction to speak of: the map counts as zero."""

Diagnostics = dict[str, Tensor]

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda u: u,
    "root": lambda u: u.sign() * u.abs().sqrt(),
    "sign": torch.sign,
}
"""What of U is summed over the cells; the clamp at 0 comes after."""


@dataclass(frozen=True)
class Granularity:
    """Which pixels share a weight: `pixel` (Mirikharaji et al. 2019), `patch(k)`, or `image` (Ren et al. 2018)."""

    cell: int | None
    """Pixels of a cell's side; None: a cell is an image."""

    @classmethod
    def parse(cls, text: str) -> "Granularity":
        """Of `pixel`, `patch(k)` or `image`. Raises ValueError for another word."""
        if text in ("pixel", "image"):
            return cls(1 if text == "pixel" else None)
        if patch := re.fullmatch(r"patch\(([1-9][0-9]*)\)", text):
            return cls(int(patch[1]))
        raise ValueError(f"granularity {text!r}: pixel, patch(k) or image")

    @property
    def needs_alignment(self) -> bool:
        """Whether cells are made from the map of U, and not from logits and tangents in one pass."""
        return self.cell not in (1, None)


@dataclass(frozen=True)
class WeightRule:
    """How U becomes W. Raises ValueError for a word that it does not know.

    transform: what of U counts: `clamp`, U itself; `root`, its square root; or `sign`, 1 wherever it is above 0.
    normalise: `batch`, the whole global batch sums to 1; or `image`, each image sums to 1/B.
    on_zero: where nothing is left to normalise, `skip` gives weight 0 (the step then carries no data gradient) and
    `uniform` the same weight to every valid pixel. Under `image` normalisation the policy acts image by image.
    """

    granularity: Granularity = Granularity(1)
    normalise: str = "batch"
    on_zero: str = "skip"
    transform: str = "clamp"

    def __post_init__(self) -> None:
        if self.normalise not in ("batch", "image"):
            raise ValueError(f"normalise {self.normalise!r}: batch or image")
        if self.on_zero not in ("skip", "uniform"):
            raise ValueError(f"on_zero {self.on_zero!r}: skip or uniform")
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform {self.transform!r}: {', '.join(TRANSFORMS)}")


class WeightMap(NamedTuple):
    """The weights of one micro-batch as pass 1 leaves them: W = scale·positive + level at valid pixels, 0 elsewhere.

    positive (B, H, W) W⁺ before normalisation, or None for a map that `level` alone describes; scale, level (B,). All
    normalisers act on the two vectors, so that no step writes the normalised map: `weighted_loss(logits, masks, *map)`.
    """

    positive: Tensor | None
    scale: Tensor
    level: Tensor

    def full(self, masks: Tensor) -> Tensor:
        """W itself, (B, H, W)."""
        return normalise(self.positive, masks, self.scale, self.level)

    def by_class(self, masks: Tensor, class_weights: Tensor | None) -> "WeightMap":
        """v·W, v the element of class_weights (classes,) of each label; the map itself where there are none."""
        if class_weights is None:
            return self
        weights = self.full(masks) * class_factors(masks, class_weights.to(self.scale.dtype))
        return WeightMap(weights, torch.ones_like(self.scale), torch.zeros_like(self.level))

    def times(self, factor: float) -> "WeightMap":
        return WeightMap(self.positive, self.scale * factor, self.level * factor)


def class_factors(masks: Tensor, class_weights: Tensor) -> Tensor:
    """The element of class_weights (classes,) of each label, (B, H, W); of no meaning where a label is no class id."""
    return class_weights[masks.long().clamp(0, len(class_weights) - 1)]


class Cells(NamedTuple):
    """W⁺ of one micro-batch and what is known of each image: sums (B, 5) of distseg.ops.positive_part."""

    positive: Tensor | None
    sums: Tensor

    @classmethod
    def of_alignment(cls, alignment_BHW: Tensor, masks_BHW: Tensor, granularity: Granularity) -> "Cells":
        """U summed over the valid pixels of each cell, clamped at 0, and spread evenly over them."""
        positive, sums = positive_part(alignment_BHW, masks_BHW, granularity.cell or 1)
        return cls(None if granularity.cell is None else positive, sums)

    @classmethod
    def of_tangents(cls, logits: Tensor, tangents: Tensor, masks: Tensor, granularity: Granularity) -> "Cells":
        """The same in one pass over logits and tangents, for a granularity that needs no map of U."""
        positive, sums = positive_alignment(logits, tangents, masks)
        return cls(None if granularity.cell is None else positive, sums)

    def affine(self) -> tuple[Tensor, Tensor]:
        """scale and level (B,), float64, before normalisation: an image that is one cell has its share as a level."""
        aligned, _, _, valid, _ = self.sums.unbind(1)
        if self.positive is None:
            return torch.zeros_like(aligned), aligned.clamp(min=0) / valid.clamp(min=1)
        return torch.ones_like(aligned), torch.zeros_like(aligned)


def weight_maps(
    cells: Sequence[Cells],
    masks: Sequence[Tensor],
    gradient_norm: Tensor,
    rule: WeightRule,
    reduction: Reduction,
    true_masks: Sequence[Tensor] | None = None,
) -> tuple[list[WeightMap], Diagnostics]:
    """The weight maps of a step's noisy micro-batches and 0-dim diagnostics of the global batch.

    One reduction of eight numbers over the ranks; nothing leaves the device. Diagnostics: gradient_norm;
    effective_fraction 1 / (N ΣW²); zero_fraction of the N valid pixels; zero_maps, how often the policy acted; and
    with `true_masks` noise_rate and wrong_mass, the share of the weight on wrongly labelled pixels.
    """
    dtype = gradient_norm.dtype
    # Without a direction U is noise. A NaN norm is not below the floor: it passes on, and shows in the loss.
    flat = gradient_norm <= GRADIENT_FLOOR
    uniform = rule.on_zero == "uniform"
    truths: Sequence[Tensor | None] = true_masks or [None] * len(masks)

    shapes, numbers = [], []
    for own, labels, truth in zip(cells, masks, truths, strict=True):
        scale, level = (torch.where(flat, 0.0, vector) for vector in own.affine())
        zero_images = torch.zeros_like(scale)
        if rule.normalise == "image":
            scale, level, zero_images = _normalise_images(own.sums, scale, level, uniform)
        shapes.append((own.positive, scale, level))
        numbers.append(_numbers(own, scale, level, zero_images, labels, truth))
    totals = reduction.sum(torch.stack(numbers).sum(0))
    mass, squares, count, zeros, images, zero_maps, wrong_mass, wrong_count = totals.unbind()
    nothing = mass <= 0

    if rule.normalise == "image":
        divisor, fallback = images, torch.zeros_like(mass)
    else:
        zero_maps = nothing.double()
        divisor = torch.where(nothing, 1.0, mass)
        fallback = torch.where(nothing, 1 / count.clamp(min=1), 0.0) if uniform else torch.zeros_like(mass)
    maps = [
        WeightMap(positive, (scale / divisor).to(dtype), (level / divisor + fallback).to(dtype))
        for positive, scale, level in shapes
    ]

    diagnostics = {
        "gradient_norm": gradient_norm,
        "effective_fraction": torch.where(nothing, float(uniform), mass.square() / (count * squares)),
        "zero_fraction": torch.where(nothing, float(not uniform), zeros / count),
        "zero_maps": zero_maps,
    }
    if true_masks is not None:
        noise_rate = wrong_count / count
        wrong_mass = torch.where(nothing, noise_rate if uniform else 0.0, wrong_mass / mass)
        diagnostics |= {"noise_rate": noise_rate, "wrong_mass": wrong_mass}
    return maps, diagnostics


def uniform_weights(masks: Sequence[Tensor], reduction: Reduction, dtype: torch.dtype) -> list[WeightMap]:
    """1/N on each of the N valid pixels of the global batch: the plain mean loss, written as weight maps."""
    own = torch.stack([valid_pixels(m).sum() for m in masks]).sum()
    count = reduction.sum(own).clamp(min=1).to(dtype)
    return [WeightMap(None, count.new_zeros(len(m)), (1 / count).expand(len(m))) for m in masks]


def joined(maps: Sequence[WeightMap], masks: Sequence[Tensor]) -> WeightMap:
    """The weight map of several micro-batches as one."""
    scale, level = torch.cat([m.scale for m in maps]), torch.cat([m.level for m in maps])
    if all(m.positive is None for m in maps):
        return WeightMap(None, scale, level)
    positive = [
        scale.new_zeros(y.shape) if m.positive is None else m.positive for m, y in zip(maps, masks, strict=True)
    ]
    return WeightMap(torch.cat(positive), scale, level)


def detection_histogram(alignments: Sequence[Tensor], masks: Sequence[Tensor], true_masks: Sequence[Tensor]) -> Tensor:
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


def _normalise_images(sums: Tensor, scale: Tensor, level: Tensor, uniform: bool) -> tuple[Tensor, Tensor, Tensor]:
    """scale and level with which every image sums to 1, the policy where none can; and which images those are."""
    total, _, count = _moments(sums, scale, level)
    nothing = (total <= 0) & (count > 0)
    divisor = torch.where(total <= 0, 1.0, total)
    fallback = torch.where(nothing, 1 / count.clamp(min=1), 0.0) if uniform else torch.zeros_like(total)
    return scale / divisor, level / divisor + fallback, nothing.double()


def _moments(sums: Tensor, scale: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ΣW, ΣW² and the number of valid pixels of each image, for W = scale·W⁺ + level."""
    _, mass, squares, count, _ = sums.unbind(1)
    return (
        scale * mass + level * count,
        scale.square() * squares + 2 * scale * level * mass + level.square() * count,
        count,
    )


def _numbers(
    cells: Cells, scale: Tensor, level: Tensor, zero_images: Tensor, masks: Tensor, true_masks: Tensor | None
) -> Tensor:
    """(8,) float64, this micro-batch's part of what `weight_maps` sums over the global batch."""
    mass, squares, count = _moments(cells.sums, scale, level)
    zeros = torch.where(level > 0, 0.0, torch.where(scale > 0, cells.sums[:, 4], count))
    wrong_mass = wrong_count = torch.zeros_like(mass)
    if true_masks is not None:
        wrong = valid_pixels(masks) & valid_pixels(true_masks) & (masks != true_masks)
        dtype = scale.dtype if cells.positive is None else cells.positive.dtype
        weights = normalise(cells.positive, masks, scale.to(dtype), level.to(dtype))
        wrong_mass, wrong_count = (weights * wrong).sum((1, 2), dtype=torch.float64), wrong.sum((1, 2))
    numbers = (mass, squares, count, zeros, torch.ones_like(mass), zero_images, wrong_mass, wrong_count)
    return torch.stack([number.sum().double() for number in numbers])
