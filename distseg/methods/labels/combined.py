"""The labels of noisy images from all of their annotators and the network (distseg/labels/combination.py).

Before anything is known of them the annotators are a vote, the masks of the batch: the class that most of them mark.
What the network adds is measured on clean images that it has not learned from and that are annotated too, where there
are such: there, it must bring the labels nearer to the references than the vote is, in Dice and by more than the
standard error and `least_gain` beside. Clean images without annotations say nothing of that, and the vote stands.
docs/ablation.md has the figures.
"""

import torch
from torch import Tensor

from distseg import ops
from distseg.data.annotators import vote
from distseg.data.batch import EveryAnnotation
from distseg.data.classes import IGNORE
from distseg.labels.calibration import (
    calibrated,
    calibration_sums,
    dice_gain_sums,
    joint_newton_step,
    mean_gain,
    relative_logits,
)
from distseg.labels.combination import (
    annotation_counts,
    annotator_scores,
    reliability,
)
from distseg.meta.weights import Diagnostics
from distseg.methods.labels.averages import MEMORY, averaged
from distseg.methods.part import FOLDS, HeldOut, LabelModel


class Combined(LabelModel):
    """All state is the same on every rank, float64."""

    def __init__(
        self,
        device: torch.device,
        classes: int,
        annotators: int,
        clean_count: int,
        least_gain: float,
        decide_after: int,
        pooled: bool,
    ) -> None:
        """annotators: A; clean_count and decide_after as of Corrected; pooled: whether the annotators count as one."""
        self.classes, self.clean_count, self.least_gain = classes, clean_count, least_gain
        self.decide_after, self.pooled = decide_after, pooled

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        size = classes + 1
        self.counts = torch.eye(classes, dtype=torch.float64, device=device).repeat(annotators, 1, 1)
        """(A, C, C): expected class, drawn class. They start from annotators who do not err."""
        self.drawn = zeros(annotators) + 1
        """(A,) the annotations that they are of."""
        self.theta = torch.cat([zeros(1) + 1, zeros(size - 1)])
        """(a, τ, b): the network alone, for a start."""
        self.fit = zeros(FOLDS, 1 + size + size**2)
        """Averaged `calibration_sums` of each fold of the clean images."""
        self.gain = zeros(3)
        """Averaged `dice_gain_sums`: of the network, beside the vote."""
        self.known = zeros()
        """Steps with clean images that the network had not learned from."""
        self.corrects = zeros()
        """1 if labels are the posterior's, 0 if they are the vote's."""

    def bins(self, masks: Tensor, every: EveryAnnotation | None) -> EveryAnnotation:
        if every is None:
            raise ValueError("batches without annotations")
        return every

    def correct(
        self, logits: Tensor, masks: Tensor, bins: EveryAnnotation, held_out: HeldOut | None
    ) -> tuple[Tensor, Tensor]:
        tables = self.theta[1] * self._reliability()
        calibration = torch.cat([self.theta[:1], self.theta[2:]])
        best, counts = ops.correct_labels(logits, masks, bins.masks, bins.annotators, tables, calibration)
        labels = torch.where(self.corrects > 0, best, masks)
        parts = [counts, annotation_counts(bins.annotators, len(self.counts))]
        if held_out is not None and held_out.every is not None:
            parts += self._evidence_of_clean(held_out, held_out.every)
        return labels, torch.cat([part.flatten() for part in parts])

    def learn(self, evidence: Tensor, skipped: Tensor, lr: float) -> Diagnostics:
        sizes = [self.counts.numel(), self.drawn.numel()]
        counts, drawn, clean = evidence.split([*sizes, len(evidence) - sum(sizes)])
        keep = ~skipped & evidence.isfinite().all()
        self.counts = torch.where(keep, averaged(self.counts, counts.view_as(self.counts)), self.counts)
        self.drawn = torch.where(keep, averaged(self.drawn, drawn), self.drawn)
        if len(clean):
            self._learn_from_clean(clean, keep)
        gain, error = mean_gain(self.gain, self.clean_count)
        return {
            "labels/gain": gain,
            "labels/gain_error": error,
            "labels/corrects": self.corrects,
            "labels/scale": self.theta[0],
            "labels/exponent": self.theta[1],
            "labels/shift": self.theta[2],
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in _STATE:
            setattr(self, name, state[name].to(getattr(self, name)))

    def _evidence_of_clean(self, clean: HeldOut, every: EveryAnnotation) -> list[Tensor]:
        """What `fit` and `gain` are averaged from, of the images that are annotated."""
        annotated = (every.annotators >= 0).any(1)[:, None, None]
        masks = torch.where(annotated, clean.masks, IGNORE)
        relative = relative_logits(clean.logits)
        scores = annotator_scores(*every, self._reliability(), relative.dtype)
        thetas = torch.stack([joint_newton_step(self.theta, self.fit.sum(0) - own) for own in self.fit])[clean.fold]
        calibration, exponent = torch.cat([thetas[:, :1], thetas[:, 2:]], 1), thetas[:, 1, None, None, None]
        labels = (exponent.to(scores.dtype) * scores + calibrated(relative, calibration)).argmax(1)
        images = zip(relative.split(1), masks.split(1), scores.split(1), strict=True)
        return [
            clean.by_fold([calibration_sums(z, mask, self.theta, score) for z, mask, score in images]),
            dice_gain_sums(labels, vote(every.masks, self.classes), masks, self.classes),
        ]

    def _learn_from_clean(self, evidence: Tensor, keep: Tensor) -> None:
        """From clean images that the network has not learned from; and whose labels count from here on."""
        fit, gain = evidence.split([self.fit.numel(), self.gain.numel()])
        fit = fit.view_as(self.fit)
        keep = keep & (fit[:, 0].sum() > 0)
        self.fit = torch.where(keep, averaged(self.fit, fit), self.fit)
        self.theta = torch.where(keep, joint_newton_step(self.theta, self.fit.sum(0)), self.theta)
        self.gain = torch.where(keep, averaged(self.gain, gain), self.gain)
        self.known = self.known + keep
        mean, error = mean_gain(self.gain, self.clean_count)
        pays = (self.known >= self.decide_after) & (mean - error > self.least_gain)
        # Asked again at every step; when the clean images are learned from, the last word stands.
        self.corrects = torch.where(keep, pays.double(), self.corrects)

    def _reliability(self) -> Tensor:
        return reliability(MEMORY * self.counts, MEMORY * self.drawn, self.pooled)


_STATE = ("counts", "drawn", "theta", "fit", "gain", "known", "corrects")
