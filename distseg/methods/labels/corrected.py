"""The labels of the noisy images as they most probably are, by the label model of distseg/labels.

Calibration and counts are averages over the last steps, from logits that the loss needs anyway and from one forward
pass of clean images. Labels stay as drawn until the clean images that the network has not learned from show that
correction pays: the shift of the calibration takes away a share of the loss on these images that is above its own
standard error by `least_gain`. A network averages out what annotators do to both sides; what they do to one side it
learns, and the shift is how much of that the clean images show. Once labels are corrected they stay so.
docs/ablation.md has the reasoning and the figures.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distseg.data.batch import EveryAnnotation
from distseg.labels.annotators import expected_counts, identity_prior, most_probable_labels, posterior_logits
from distseg.labels.calibration import (
    calibrated,
    calibration_sums,
    gain_sums,
    identity,
    newton_step,
    relative_gain,
    relative_logits,
)
from distseg.labels.distances import signed_distance_bins
from distseg.meta.weights import Diagnostics
from distseg.methods.context import Context
from distseg.methods.labels.averages import averaged
from distseg.methods.labels.combined import Combined
from distseg.methods.part import HeldOut, LabelModel
from distseg.section import Section

LEAST_STEPS = 20
"""With held-out clean images, before a label may be corrected; a fifth of all steps in shorter runs."""


class CorrectedConfig(Section):
    kind: Literal["corrected"] = "corrected"
    least_gain: Annotated[float, Field(ge=-1, le=1)] = 0.05
    """Labels stay as drawn unless the clean images show systematic errors that cost the network a share of its loss
    which is above its standard error by this. −1 corrects always. Of data.annotators=all, the same of what the
    network takes away from the loss of the annotators alone."""
    pooled: bool = False
    """Of data.annotators=all: count the annotators as one, because their names are places in a list, not persons."""

    needs_clean: ClassVar[bool] = True

    def build(self, context: Context) -> LabelModel:
        decide_after = min(LEAST_STEPS, max(1, context.steps // 5))
        rule = (len(context.clean), self.least_gain, decide_after)
        if context.annotators is None:
            return Corrected(context.device, context.classes, *rule)
        return Combined(context.device, context.classes, context.annotators, *rule, self.pooled)


class Corrected(LabelModel):
    """All state is the same on every rank, float64."""

    def __init__(
        self, device: torch.device, classes: int, clean_count: int, least_gain: float, decide_after: int
    ) -> None:
        """clean_count: how many different clean images there are; decide_after: steps with them before a correction."""
        self.classes, self.clean_count, self.least_gain = classes, clean_count, least_gain
        self.decide_after = decide_after
        self.counts = identity_prior(classes, device)
        """(C, bins) of the posterior. They start from annotators who do not err and move a tenth of the way a step:
        counts of the network alone, for a start, trust the masks too little (docs/ablation.md)."""
        self.theta = identity(classes, device).repeat(2, 1)
        """(2, C): the calibration, and the one that has no shift."""
        self.fit = torch.zeros(2, 1 + classes + classes**2, dtype=torch.float64, device=device)
        """Averaged `calibration_sums` of the two."""
        self.gain = torch.zeros(4, dtype=torch.float64, device=device)
        """Averaged `gain_sums`."""
        self.known = torch.zeros((), dtype=torch.float64, device=device)
        """Steps with clean images that the network had not learned from."""
        self.corrects = torch.zeros((), dtype=torch.float64, device=device)
        """1 if labels are corrected, 0 if not, or not yet."""

    def bins(self, masks: Tensor, every: EveryAnnotation | None = None) -> Tensor:
        return signed_distance_bins(masks, self.classes)

    def labels(self, logits: Tensor, masks: Tensor, bins: Tensor) -> Tensor:
        return torch.where(self.corrects > 0, most_probable_labels(self._posterior(logits, bins), masks), masks)

    def evidence(self, logits: Tensor, masks: Tensor, bins: Tensor, held_out: HeldOut | None) -> Tensor:
        parts = [expected_counts(self._posterior(logits, bins).softmax(1), masks, bins, self.counts.shape[1])]
        if held_out is None:
            parts += [torch.zeros_like(self.fit), torch.zeros_like(self.gain)]
        else:
            relative = relative_logits(held_out.logits)
            parts += [calibration_sums(relative, held_out.masks, theta) for theta in self.theta]
            parts += [gain_sums(relative, held_out.masks, *self.theta)]
        return torch.cat([part.flatten() for part in parts])

    def learn(self, evidence: Tensor, skipped: Tensor, lr: float) -> Diagnostics:
        counts, fit, gain = (
            part.view_as(like)
            for part, like in zip(
                evidence.split([self.counts.numel(), self.fit.numel(), self.gain.numel()]),
                (self.counts, self.fit, self.gain),
                strict=True,
            )
        )
        keep = ~skipped & evidence.isfinite().all()
        held_out = keep & (fit[0, 0] > 0)
        self.counts = torch.where(keep, averaged(self.counts, counts), self.counts)
        self.fit = torch.where(held_out, averaged(self.fit, fit), self.fit)
        ahead = torch.stack([newton_step(self.theta[0], self.fit[0]), newton_step(self.theta[1], self.fit[1], False)])
        self.theta = torch.where(held_out, ahead, self.theta)
        self.gain = torch.where(held_out, averaged(self.gain, gain), self.gain)
        self.known = self.known + held_out
        share, error = relative_gain(self.gain, self.clean_count)
        pays = held_out & (self.known >= self.decide_after) & (share - error >= self.least_gain)
        # For good: corrected labels take the shift away.
        self.corrects = torch.where(pays, 1.0, self.corrects)
        return {
            "labels/gain": share,
            "labels/gain_error": error,
            "labels/corrects": self.corrects,
            "labels/scale": self.theta[0, 0],
            "labels/shift": self.theta[0, 1],
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in _STATE:
            setattr(self, name, state[name].to(getattr(self, name)))

    def _posterior(self, logits: Tensor, bins: Tensor) -> Tensor:
        """(B, C, H, W): log P(c | x, m), up to a constant."""
        return posterior_logits(calibrated(relative_logits(logits), self.theta[0]), bins, self.counts)


_STATE = ("counts", "theta", "fit", "gain", "known", "corrects")
