"""One factor a label, steered by the clean gradient: against noise that is wrong in one direction."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distseg.meta.estimators import SumOverRanks
from distseg.ops import IGNORE

LARGEST_RATIO = 20.0
"""No label counts more than so many times another."""


class LabelBalance:
    """Multiplies the weight of each pixel by e^a, with one a for each label, which every step moves.

    With Ū_c the mean of U over the pixels of the global batch that are labelled c, a step is

        a_c ← a_c + rate · (Ū_c − mean of Ū) / Σ |Ū|,    sum and mean over the labels that are there

    and a stays within ±½ log LARGEST_RATIO. Where masks are all too small, the network expects too little lesion, and
    the clean gradient asks for more of it nearly everywhere: U has one sign at most pixels of a label, right or wrong.
    A pixel's own U then says little about that pixel, and the mean over a label, taken over steps, much about the
    label. Where the labels serve the clean loss equally well, a rests.
    """

    def __init__(self, rate: float) -> None:
        if rate < 0:
            raise ValueError(f"rate {rate} must not be below 0")
        self.rate = rate
        self.log_factors = torch.zeros(IGNORE, dtype=torch.float64)
        """(255,): a of each class id, the same on every rank."""

    def update(self, alignments: Sequence[Tensor], masks: Sequence[Tensor], sum_over_ranks: SumOverRanks) -> None:
        """One step of a, from U and the labels (B, H, W) of this rank's micro-batches. None where it is not finite."""
        # In float64 the order of the sums, which a GPU leaves open, does not show in the weights.
        sums = torch.zeros(2, IGNORE + 1, dtype=torch.float64, device=masks[0].device)
        for u, labels in zip(alignments, masks, strict=True):
            where, values = labels.long().flatten(), u.double().flatten()
            sums.scatter_add_(1, where.expand(2, -1), torch.stack([values, torch.ones_like(values)]))
        total, count = sum_over_ranks(sums)[:, :IGNORE]
        there, mean = count > 0, total / count.clamp(min=1)
        ahead = torch.where(there, mean - mean.sum() / there.sum(), 0.0)
        step = self.rate * ahead / mean.abs().sum()
        bound = math.log(LARGEST_RATIO) / 2
        moved = (self.log_factors.to(step.device) + step).clamp(-bound, bound)
        self.log_factors = torch.where(step.isfinite().all(), moved, self.log_factors.to(step.device))

    def factors(self, masks: Tensor) -> Tensor:
        """e^a of each pixel's label (B, H, W) float64; 1 at ignored pixels."""
        ignored = self.log_factors.new_zeros(1)
        return torch.cat([self.log_factors, ignored]).to(masks.device).exp()[masks.long()]
