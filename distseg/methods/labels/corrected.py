"""The labels of the noisy images as they most probably are, by the label model of distseg/labels.

Calibration and counts are averages over the last steps, from logits that the loss needs anyway and from one forward
pass of clean images, before the network learns from any. Labels stay as drawn until these images show that correction
pays, in Dice, by more than `least_gain` above its standard error, or twice that.

Where annotators have drawn clean images too, these are corrected as the noisy ones are and held against the references.
Else all that shows is what annotators do to one side. A network averages out what they do to both; the rest it learns.
So it is calibrated twice, to the references of the clean images and to the noisy images as drawn, and correction pays
where the first brings the network's masks of the clean images nearer to their references than the second does, which
has what a young network itself gets wrong. Such a correction is for good.

How far annotators err is counted twice, by the size of what they draw and by the pixel. Labels are those of the first,
unless, when correction begins or clearly later, the objects of the second grow with the network's more as those of the
clean images do (labels/areas.py).

Either way an image is judged by the calibration to the other ones, a tenth of them left out at a time: what ten images
happen to share is no error of the annotators. An image whose object the network misses keeps its mask.
docs/ablation.md has the reasoning and the figures.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distseg import ops
from distseg.data.batch import EveryAnnotation
from distseg.data.classes import IGNORE
from distseg.errors import UserError
from distseg.labels.annotators import identity_prior, log_likelihood
from distseg.labels.areas import area_sums, slope
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
from distseg.methods.part import FOLDS, HeldOut, LabelModel
from distseg.ops import valid_pixels
from distseg.section import Section

LEAST_GAIN = 0.02
"""In Dice. Masks that people made, right on average, were seen to move it by a hundredth to either side."""
MOST_REMOVED = 0.4
"""Of the pixels that an image's mask shows as objects, the most that a correction may make background. Where it would
be more, the network has not found the object, and the mask stays as drawn."""
LEAST_IMAGES = 4
"""With fewer clean images no spread can be told."""
PAIRED_ERRORS = 2.0
"""How many standard errors a gain that is measured on labels must be above `least_gain`: it is asked at each step."""
ERRORS, LATE_ERRORS = 0.5, 2.0
"""How many standard errors of the clean images' power labels by frame must be nearer to it than those by object. Both
mistakes cost the same; half an error makes them about as frequent with ten clean images (docs/ablation.md). Once labels
are corrected it is asked again at each step, so it is two."""
LEAST_STEPS = 20
"""With held-out clean images, before a label may be corrected; a fifth of all steps in shorter runs."""


class CorrectedConfig(Section):
    kind: Literal["corrected"] = "corrected"
    least_gain: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Labels stay as drawn unless correction adds more than this to Dice, above two standard errors, on clean images
    that are annotated too: 0 unless set. With fewer than 4 of these: unless annotators' errors show in the network,
    and cost it that much above one error, 0.02 unless set. −1 corrects always. Of data.annotators=all: unless the
    network brings the vote so much nearer to the references of clean images, 0 unless set."""
    pooled: bool = False
    """Of data.annotators=all: count the annotators as one, because their names are places in a list, not persons."""

    needs_held_out: ClassVar[bool] = True

    def build(self, context: Context) -> LabelModel:
        """Raises UserError where there are more classes than the label model has bins for."""
        if context.classes > MOST_CLASSES:
            raise UserError(
                f"method.labels corrected: is for at most {MOST_CLASSES} classes, and data.classes has "
                f"{context.classes}; set method.labels=drawn"
            )
        decide_after = min(LEAST_STEPS, max(1, context.steps // 5))
        size = (context.device, context.classes)
        if context.annotators is not None:
            count, least = len(context.paired), self.least_gain or 0.0
            return Combined(*size, context.annotators, count, least, decide_after, self.pooled)
        paired = len(context.paired) >= LEAST_IMAGES
        count = len(context.paired if paired else context.clean)
        usual = 0.0 if paired else LEAST_GAIN if count >= LEAST_IMAGES else math.inf
        return Corrected(*size, count, usual if self.least_gain is None else self.least_gain, decide_after, paired)


class Corrected(LabelModel):
    """All state is the same on every rank, float64."""

    def __init__(
        self,
        device: torch.device,
        classes: int,
        clean_count: int,
        least_gain: float,
        decide_after: int,
        paired: bool = False,
    ) -> None:
        """clean_count: how many different clean images say whether correction pays; decide_after: steps with them
        before one; paired: whether they do so by what annotators have drawn of them."""
        self.classes, self.clean_count, self.least_gain = classes, clean_count, least_gain
        self.decide_after, self.paired = decide_after, paired
        self.counts = identity_prior(classes, device).repeat(2, 1, 1)
        """(2, C, bins) of the posterior, by sizes of the objects and of the frame. They start from annotators who do
        not err and move a tenth of the way a step: counts of the network alone, for a start, trust the masks too little
        (docs/ablation.md)."""
        self.theta = identity(classes, device).repeat(2, 1)
        """(2, C): the calibration, and the one that is to the noisy images as drawn."""
        self.fit = torch.zeros(FOLDS + 1, 1 + classes + classes**2, dtype=torch.float64, device=device)
        """Averaged `calibration_sums`: of each fold of the clean images at θ[0], then of the noisy ones at θ[1]."""
        self.gain = torch.zeros(3, dtype=torch.float64, device=device)
        """Averaged `dice_gain_sums`."""
        self.areas = torch.zeros(3, 6, dtype=torch.float64, device=device)
        """Averaged `area_sums` of clean images and their references, and of noisy ones and either labels."""
        self.of_frame = torch.zeros((), dtype=torch.float64, device=device)
        """1 if labels are those by sizes of the frame."""
        self.known = torch.zeros((), dtype=torch.float64, device=device)
        """Steps with clean images that the network had not learned from."""
        self.corrects = torch.zeros((), dtype=torch.float64, device=device)
        """1 if labels are corrected, 0 if not, or not yet."""

    def bins(self, masks: Tensor, every: EveryAnnotation | None = None) -> tuple[Tensor, Tensor]:
        by_object, by_frame = (signed_distance_bins(masks, self.classes, of_frame) for of_frame in (False, True))
        return by_object, by_frame

    def correct(
        self, logits: Tensor, masks: Tensor, bins: tuple[Tensor, Tensor], held_out: HeldOut | None
    ) -> tuple[Tensor, Tensor]:
        tables = log_likelihood(self.counts)
        both = [_corrected(logits, masks, *each, self.theta[0]) for each in zip(bins, tables, strict=True)]
        (by_object, _), (by_frame, _) = both
        parts = [counts for _, counts in both]
        if held_out is not None:
            relative, clean = relative_logits(logits), relative_logits(held_out.logits)
            pairs = zip(clean.split(1), held_out.masks.split(1), strict=True)
            parts.append(held_out.by_fold([calibration_sums(*pair, self.theta[0]) for pair in pairs]))
            parts.append(calibration_sums(relative, masks, self.theta[1]))
            parts.append(area_sums(clean, self.theta[0], held_out.masks))
            parts.extend(area_sums(relative, self.theta[0], labels) for labels, _ in both)
            parts.append(self._gain_of_labels(held_out, tables) if self.paired else self._gain_of_shift(held_out))
        labels = torch.where(self.corrects > 0, self._chosen(by_object, by_frame), masks)
        return labels, torch.cat([part.flatten() for part in parts])

    def _chosen(self, by_object: Tensor, by_frame: Tensor) -> Tensor:
        return torch.where(self.of_frame > 0, by_frame, by_object)

    def _gain_of_labels(self, held_out: HeldOut, tables: Tensor) -> Tensor:
        """`dice_gain_sums` of correction, of the images that are annotated too."""
        drawn, as_it_is = held_out.drawn, identity(self.classes, tables.device)
        bins, table = self._chosen(*self.bins(drawn)), self._chosen(*tables)
        labels, _ = _corrected(self._by_others(held_out), drawn, bins, table, as_it_is)
        masks = torch.where(valid_pixels(drawn), held_out.masks, IGNORE)
        return dice_gain_sums(labels, drawn, masks, self.classes)

    def _gain_of_shift(self, held_out: HeldOut) -> Tensor:
        """`dice_gain_sums` of what the calibration to the truth adds to that to the annotators."""
        by_annotators = calibrated(relative_logits(held_out.logits), self.theta[1]).argmax(1)
        return dice_gain_sums(self._by_others(held_out).argmax(1), by_annotators, held_out.masks, self.classes)

    def _by_others(self, held_out: HeldOut) -> Tensor:
        """(B, C, H, W) logits, calibrated to the clean images of the other folds."""
        clean = self.fit[:FOLDS]
        thetas = torch.stack([newton_step(self.theta[0], clean.sum(0) - own) for own in clean])
        return calibrated(relative_logits(held_out.logits), thetas[held_out.fold])

    def learn(self, evidence: Tensor, skipped: Tensor, lr: float) -> Diagnostics:
        counts, held_out = evidence.split([self.counts.numel(), len(evidence) - self.counts.numel()])
        keep = ~skipped & evidence.isfinite().all()
        self.counts = torch.where(keep, averaged(self.counts, counts.view_as(self.counts)), self.counts)
        if len(held_out):
            self._learn_of_clean(held_out, keep)
        gain, error = mean_gain(self.gain, self.clean_count)
        return {
            "labels/gain": gain,
            "labels/gain_error": error,
            "labels/corrects": self.corrects,
            "labels/of_frame": self.of_frame,
            "labels/scale": self.theta[0, 0],
            "labels/shift": self.theta[0, 1],
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in _STATE:
            setattr(self, name, state[name].to(getattr(self, name)))

    def _learn_of_clean(self, evidence: Tensor, keep: Tensor) -> None:
        """What images that the network has not learned from say: θ, and whether and how labels are corrected."""
        fit, areas, gain = evidence.split([self.fit.numel(), self.areas.numel(), self.gain.numel()])
        fit, areas = fit.view_as(self.fit), areas.view_as(self.areas)
        keep = keep & (fit[:FOLDS, 0].sum() > 0)
        self.fit = torch.where(keep, averaged(self.fit, fit), self.fit)
        ahead = newton_step(self.theta[0], self.fit[:FOLDS].sum(0)), newton_step(self.theta[1], self.fit[FOLDS])
        self.theta = torch.where(keep, torch.stack(ahead), self.theta)
        self.areas = torch.where(keep, averaged(self.areas, areas), self.areas)
        (clean, unsure), (by_object, _), (by_frame, _) = (slope(sums, self.clean_count) for sums in self.areas)
        nearer = (by_object - clean).abs() - (by_frame - clean).abs()
        # Corrected labels lean on the network, which makes either power lower: no evidence against frames any more.
        begun = self.corrects > 0
        of_frame = torch.where(begun, (self.of_frame > 0) | (nearer > LATE_ERRORS * unsure), nearer > ERRORS * unsure)
        self.of_frame = torch.where(keep, of_frame.to(self.of_frame), self.of_frame)
        self.gain = torch.where(keep, averaged(self.gain, gain), self.gain)
        self.known = self.known + keep
        mean, error = mean_gain(self.gain, self.clean_count)
        errors = PAIRED_ERRORS if self.paired else 1.0
        pays = (self.known >= self.decide_after) & (mean - errors * error > self.least_gain)
        # A shift is for good: corrected labels take it away. Of labels it is asked again until these are learned from.
        before = torch.zeros_like(self.corrects) if self.paired else self.corrects
        self.corrects = torch.where(keep, torch.where(pays, 1.0, before), self.corrects)


def _corrected(logits: Tensor, masks: Tensor, bins: Tensor, table: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of masks (B, H, W), which stay where correction would lose an object; and counts (C, bins)."""
    one = torch.zeros(len(masks), 1, dtype=torch.int64, device=masks.device)
    labels, counts = ops.correct_labels(logits, masks, bins[:, None], one, table[None], theta)
    return torch.where(loses_object(masks, labels), masks, labels), counts


def loses_object(masks: Tensor, labels: Tensor) -> Tensor:
    """(B, 1, 1) whether labels leave less of an image's drawn objects than MOST_REMOVED allows."""
    drawn = valid_pixels(masks) & (masks > 0)
    removed = drawn & (labels == 0)
    return removed.sum((1, 2), keepdim=True) > MOST_REMOVED * drawn.sum((1, 2), keepdim=True)


_STATE = ("counts", "theta", "fit", "areas", "of_frame", "gain", "known", "corrects")
