"""The label model fitted at once to what a trained network says of many masks; training fits it step by step.

First the calibration, on images with a reference that the network has not learned from. Then, with the calibrated
network as the prior, how each annotator errs, by expectation maximisation (Dawid and Skene 1979):

    log P(c | x, m_1, …, m_R) = log P(c | x) + ½ · mean_r log P_r(m_r | c) + const

Theirs is the sum without the ½. It takes what annotators do for independent from pixel to pixel, of each other and of
the network. A mask is one decision, though, and a network that was trained on these annotators shares their errors; so
all of them together count for half an observation, as in a composite likelihood (Varin, Reid and Firth 2011).
docs/audit.md has what the weight is worth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distseg.labels.annotators import identity_prior, log_likelihood
from distseg.labels.calibration import calibration_sums, gain_sums, identity, newton_step, relative_gain
from distseg.labels.distances import bin_count
from distseg.ops import valid_pixels

ROUNDS = 10
"""Of expectation maximisation. Counts start from annotators who do not err."""
WEIGHT = 0.5
"""Of all annotators' evidence on a pixel."""
_NEWTON_STEPS = 30


def fit_calibration(examples: Sequence[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """θ (C,) float64 of pairs of relative logits (1, C, H, W) and references (1, H, W); the identity without any.

    It has a shift only where the shift takes away more of the loss than its standard error.
    """
    theta, of_scale = identity(classes, torch.device("cpu")), identity(classes, torch.device("cpu"))
    if not examples:
        return theta
    for _ in range(_NEWTON_STEPS):
        theta = newton_step(theta, _summed([calibration_sums(*each, theta) for each in examples]))
        of_scale = newton_step(of_scale, _summed([calibration_sums(*each, of_scale) for each in examples]), False)
    gain, error = relative_gain(_summed([gain_sums(*each, theta, of_scale) for each in examples]), len(examples))
    return theta if gain > error else of_scale


@dataclass(frozen=True)
class Marked:
    """Pixels that the same R annotators have labelled."""

    annotators: tuple[str, ...]
    """The R of them."""
    logits: Tensor
    """(C, N) float32, calibrated."""
    bins: Tensor
    """(R, N) uint8, 255 where ignored (distances.py)."""

    def posterior(self, counts: Mapping[str, Tensor], weight: float) -> Tensor:
        """(C, N): logits of what each pixel is, given the network and what all R have drawn; one who ignores it says
        nothing."""
        logits, share = self.logits, weight / len(self.annotators)
        for annotator, bins in zip(self.annotators, self.bins, strict=True):
            known = valid_pixels(bins)
            evidence = share * log_likelihood(counts[annotator]).to(logits.dtype)
            logits = logits + torch.where(known, evidence[:, torch.where(known, bins, 0).long()], 0.0)
        return logits


def fit_counts(blocks: Sequence[Marked], classes: int, weight: float = WEIGHT) -> dict[str, Tensor]:
    """How each annotator errs: counts (C, bins) float64 by name, of distance bins by what is expected to be there."""
    names = sorted({name for block in blocks for name in block.annotators})
    counts = {name: identity_prior(classes, torch.device("cpu")) for name in names}
    for _ in range(ROUNDS):
        found = {name: torch.zeros_like(counts[name]) for name in names}
        for block in blocks:
            probabilities = block.posterior(counts, weight).softmax(0).double()
            for name, bins in zip(block.annotators, block.bins, strict=True):
                known = valid_pixels(bins)
                found[name] += torch.stack(
                    [bins[known].bincount(each[known], bin_count(classes)) for each in probabilities]
                )
        counts = found
    return counts


def _summed(sums: Sequence[Tensor]) -> Tensor:
    return torch.stack([*sums]).sum(0)
