"""The labels of the noisy images as they most probably are, by the label model of distseg/labels.

Calibration and counts are averages over the last steps, from logits that the loss needs anyway and from one forward
pass of clean images. Labels stay as drawn until the clean images that the network has not learned from show that
correction pays: the shift of the calibration brings the network's masks of these images nearer to their references, in
Dice and by more than its own standard error and `least_gain` beside. A network averages out what annotators do to both
sides; what they do to one side it learns, and the shift is how much of that the clean images show. Once labels are
corrected they stay so, but for images whose object the network misses. docs/ablation.md has the reasoning and figures.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distseg import ops
from distseg.data.batch import EveryAnnotation
from distseg.errors import UserError
from distseg.labels.annotators import identity_prior, log_likelihood
from distseg.labels.calibration import (
    calibrated,
    calibration_sums,
    dice_gain_sums,
    identity,
    mean_gain,
    newton_step,
    relative_logits,
)
from distseg.labels.distances import MOST_CLASSES, signed_distance_bins
from distseg.meta.weights import Diagnostics
from distseg.methods.context import Context
from distseg.methods.labels.averages import averaged
from distseg.methods.labels.combined import Combined
from distseg.methods.part import HeldOut, LabelModel
from distseg.ops import valid_pixels
from distseg.section import Section

LEAST_GAIN = 0.02
"""In Dice. Masks that people made, right on average, were seen to move it by a hundredth to either side."""
MOST_REMOVED = 0.4
"""Of the pixels that an image's mask shows as objects, the most that a correction may make background. Where it would
be more, the network has not found the object, and the mask stays as drawn."""
LEAST_STEPS = 20
"""With held-out clean images, before a label may be corrected; a fifth of all steps in shorter runs."""


class CorrectedConfig(Section):
    kind: Literal["corrected"] = "corrected"
    least_gain: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Labels stay as drawn unless the clean images show systematic errors that cost the network Dice, above its
    standard error by more than this, 0.02 unless set. −1 corrects always. Of data.annotators=all: unless the network
    brings the annotators' labels so much nearer to the references of these images, 0 unless set."""
    pooled: bool = False
    """Of data.annotators=all: count the annotators as one, because their names are places in a list, not persons."""

    needs_clean: ClassVar[bool] = True

    def build(self, context: Context) -> LabelModel:
        """Raises UserError where there are more classes than the label model has bins for."""
        if context.classes > MOST_CLASSES:
            raise UserError(
                f"method.labels corrected: is for at most {MOST_CLASSES} classes, and data.classes has "
                f"{context.classes}; set method.labels=drawn"
            )
        decide_after = min(LEAST_STEPS, max(1, context.steps // 5))
        size, count = (context.device, context.classes), len(context.clean)
        if context.annotators is None:
            least = LEAST_GAIN if self.least_gain is None else self.least_gain
            return Corrected(*size, count, least, decide_after)
        return Combined(*size, context.annotators, count, self.least_gain or 0.0, decide_after, self.pooled)


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
        self.theta = identity(classes, device)
        """(C,) the calibration."""
        self.fit = torch.zeros(1 + classes + classes**2, dtype=torch.float64, device=device)
        """Averaged `calibration_sums`."""
        self.gain = torch.zeros(3, dtype=torch.float64, device=device)
        """Averaged `dice_gain_sums`."""
        self.known = torch.zeros((), dtype=torch.float64, device=device)
        """Steps with clean images that the network had not learned from."""
        self.corrects = torch.zeros((), dtype=torch.float64, device=device)
        """1 if labels are corrected, 0 if not, or not yet."""

    def bins(self, masks: Tensor, every: EveryAnnotation | None = None) -> Tensor:
        return signed_distance_bins(masks, self.classes)

    def correct(self, logits: Tensor, masks: Tensor, bins: Tensor, held_out: HeldOut | None) -> tuple[Tensor, Tensor]:
        tables, one = log_likelihood(self.counts)[None], self.counts.new_zeros((len(masks), 1), dtype=torch.int64)
        most_probable, counts = ops.correct_labels(logits, masks, bins[:, None], one, tables, self.theta)
        labels = torch.where((self.corrects > 0) & ~loses_object(masks, most_probable), most_probable, masks)
        parts = [counts]
        if held_out is not None:
            relative = relative_logits(held_out.logits)
            own, shifted = relative.argmax(1), calibrated(relative, self.theta).argmax(1)  # a scale changes no label
            parts.append(calibration_sums(relative, held_out.masks, self.theta))
            parts.append(dice_gain_sums(shifted, own, held_out.masks, self.classes))
        return labels, torch.cat([part.flatten() for part in parts])

    def learn(self, evidence: Tensor, skipped: Tensor, lr: float) -> Diagnostics:
        counts, held_out = evidence.split([self.counts.numel(), len(evidence) - self.counts.numel()])
        keep = ~skipped & evidence.isfinite().all()
        self.counts = torch.where(keep, averaged(self.counts, counts.view_as(self.counts)), self.counts)
        if len(held_out):
            self._learn_calibration(held_out, keep)
        gain, error = mean_gain(self.gain, self.clean_count)
        return {
            "labels/gain": gain,
            "labels/gain_error": error,
            "labels/corrects": self.corrects,
            "labels/scale": self.theta[0],
            "labels/shift": self.theta[1],
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in _STATE:
            setattr(self, name, state[name].to(getattr(self, name)))

    def _learn_calibration(self, evidence: Tensor, keep: Tensor) -> None:
        """From clean images that the network has not learned from, and whether labels are corrected from here on."""
        fit, gain = evidence.split([self.fit.numel(), self.gain.numel()])
        keep = keep & (fit[0] > 0)
        self.fit = torch.where(keep, averaged(self.fit, fit), self.fit)
        self.theta = torch.where(keep, newton_step(self.theta, self.fit), self.theta)
        self.gain = torch.where(keep, averaged(self.gain, gain), self.gain)
        self.known = self.known + keep
        mean, error = mean_gain(self.gain, self.clean_count)
        pays = keep & (self.known >= self.decide_after) & (mean - error > self.least_gain)
        # For good: corrected labels take the shift away.
        self.corrects = torch.where(pays, 1.0, self.corrects)


def loses_object(masks: Tensor, labels: Tensor) -> Tensor:
    """(B, 1, 1) whether labels leave less of an image's drawn objects than MOST_REMOVED allows."""
    drawn = valid_pixels(masks) & (masks > 0)
    removed = drawn & (labels == 0)
    return removed.sum((1, 2), keepdim=True) > MOST_REMOVED * drawn.sum((1, 2), keepdim=True)


_STATE = ("counts", "theta", "fit", "gain", "known", "corrects")
