"""Can a meta-gradient, or a rival, beat label_correction, or plain training with the clean images? A screen.

    python benchmarks/meta_gradients.py DATA [--variants …] [--steps 400] [--seeds 20] [--set section.key=value …] \
        [--json FILE]

Every variant has the network, optimiser, schedule, streams, batches, augmentation and validation of
configs/isic2017.yaml at the budget of configs/experiments/human_noise.yaml, K = 10 clean images, and the phases of
`label_correction`: noisy images as drawn for 0.3 of the steps, the variant's labels and weights from then on, and from
0.6 on the clean images beside them with half of the loss. One process on the CPU, float32, two classes. The file is
written after every run; given again, the command goes on with the runs that are not in it. Choose by val Dice, never by
the test split.

A variant is a weight W and a target q for each noisy pixel; the loss is Σ W·CE(q, p), p the foreground's probability.
y is the drawn label. g is the clean gradient, from held-out images: all clean ones before 0.6 of the steps; from then
on every other one, in the order of their ids, while the rest is learned from. ż is the logits' tangent along g. A small
step on Σ W·CE(q, p) lowers the clean loss in proportion to Σ W (p − q)·ż, which gives every meta-gradient below.

    uniform              y, all pixels the same: the preset with labels.kind=drawn
    uniform_half         the same, learning from the half of the clean images that all who take a gradient learn from
    label_correction     the preset
    held_out_gradient    y, W ∝ max(U, 0), U = (p − y)·ż (Mirikharaji et al. 2019, arXiv 1906.03815)
    gradient_after_step  the same with g taken after a virtual SGD step on the loss that `uniform` would have, which is
                         as long as the optimiser's last update; the tangent is at the present parameters
    both_labels          y and a corrected label, each with its own weight ∝ max(U, 0), together 1 (Zhou et al. 2022,
                         "Learning to Bootstrap for Combating Label Noise", arXiv 2202.04291). The corrected label is
                         the label model's once that corrects, and what the network predicts until then
    gate                 q = r·y + (1 − r)·t, t of a teacher that averages the network, r = MLP(features, y, t) by the
                         meta-gradient, and by y = truth on held-out images that have a drawn mask too (Taraday and
                         Baskin 2023, "Enhanced Meta Label Correction for Coping with Label Corruption", at pixels)
    learned_counts       q = posterior of the label model, whose table P(bin | class) moves along the meta-gradient
    ema_teacher          q = ½·y + ½·t (Reed et al. 2015, soft bootstrapping, with the teacher of Tarvainen and Valpola
                         2017)
    spatial_correction   the prediction, its contour moved by its mean distance from the clean images' (Yao et al. 2023,
                         "Learning to Segment from Noisy Annotations: A Spatial Correction Approach")
    adele                y, or what a network is sure of (0.8) that was kept when early learning ended (Liu et al. 2022,
                         "Adaptive Early-Learning Correction for Segmentation from Noisy Annotations")

What differs from the sources. All: this schedule, in which nothing starts again. both_labels: no augmented copies whose
predictions are averaged. gate: a small MLP on the network's own features, which learn nothing from it; no adversarial
training; g at the present parameters, where theirs is after the step. ema_teacher: no noise between the two, and a
teacher that starts where the warm-up ends. spatial_correction: two rounds, at 0.3 and 0.6, with hard contours, and Δ in
pixels of the network's input. adele: no loss for consistency between scales; a twentieth of the steps, and the IoU of
its batches, stand for an epoch; there is one correction, not before the warm-up ends.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from measure import describe_machine
from scipy.optimize import curve_fit
from torch import Tensor, nn

from distseg.config.load import load_config
from distseg.data.batch import Batch, Labels
from distseg.data.noise.write import write_noisy_masks
from distseg.data.sample import Sample
from distseg.data.streams import Stream, evaluation_batches
from distseg.distributed.runtime import Runtime, start_runtime, stop_runtime
from distseg.evaluation.metrics import image_scores
from distseg.files import write_atomically
from distseg.labels.annotators import log_likelihood
from distseg.labels.calibration import calibrated, relative_logits
from distseg.meta.estimators import logits_along, mean_gradient, norm
from distseg.meta.network import Parameters, StatelessNetwork
from distseg.meta.placement import Whole
from distseg.meta.reduction import OneProcess
from distseg.meta.weights import Diagnostics
from distseg.methods.labels.corrected import Corrected
from distseg.methods.losses.cross_entropy import CrossEntropy
from distseg.methods.part import HeldOut
from distseg.methods.step import MicroBatch, Step
from distseg.models.registry import build_model
from distseg.ops import alignment, valid_pixels
from distseg.optim.schedules import learning_rate
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
BUDGET = (
    *("data.image_size=48", "data.clean_count=10", "data.pipeline=torch", "model.width=8", "train.epochs=null"),
    *("train.batch_size=16", "train.clean_batch_size=16", "train.validate_every=50", "tracking.mlflow=false"),
)
TEACHER_DECAY = 0.99
GATE_RATE, TABLE_RATE = 1e-2, 2e-2
"""Of the Adam that the gate, and the table of learned_counts, have of their own."""
GATE_START = 2.0
"""The logit of r before anything is learned: drawn labels are trusted, r = 0.88."""
ADELE_SLOPE, ADELE_SURE, ADELE_SCALES = 0.9, 0.8, (0.7, 1.0, 1.5)
ADELE_TIMES = 20
"""How often in a run IoU is measured: about as many as the paper has epochs, of which a screen has three."""


class Targets(NamedTuple):
    """What pixels (B, H, W) are to teach: Σ W·CE(q, p)."""

    weights: Tensor
    """W ≥ 0; those of a step sum to 1, or to 0 where nothing is to be learned. 0 where the mask is ignored."""
    foreground: Tensor
    """q in [0, 1]."""

    def loss(self, logits: Tensor) -> Tensor:
        """A scalar, of logits (B, 1, H, W)."""
        return F.binary_cross_entropy_with_logits(logits[:, 0], self.foreground, self.weights, reduction="sum")


def as_foreground(masks: Tensor) -> Tensor:
    """Class ids (B, H, W) as targets; 0 where they are ignored."""
    return (masks == 1).float()


def uniform(masks: Tensor, foreground: Tensor | None = None) -> Targets:
    """The same weight for each valid pixel of masks (B, H, W), and its label unless another target is given."""
    valid = valid_pixels(masks).float()
    return Targets(valid / valid.sum().clamp(min=1), as_foreground(masks) if foreground is None else foreground)


def shares(*alignments: Tensor) -> list[Tensor]:
    """max(U, 0) of each map, over the sum of them all; 0 where no pixel of any map is aligned."""
    positive = [each.clamp(min=0) for each in alignments]
    total = torch.stack(positive).sum()
    return [each / total.clamp(min=torch.finfo(each.dtype).tiny) for each in positive]


def of_both_labels(logits: Tensor, tangents: Tensor, drawn: Tensor, corrected: Tensor) -> Targets:
    """α·ℓ(drawn) + β·ℓ(corrected), which is (α + β)·CE(q, p) with q the share of the weight that says foreground."""
    alpha, beta = shares(alignment(logits, tangents, drawn), alignment(logits, tangents, corrected))
    weights = alpha + beta
    says_foreground = alpha * as_foreground(drawn) + beta * as_foreground(corrected)
    return Targets(weights, torch.where(weights > 0, says_foreground / weights, 0.0))


def meta_loss(targets: Targets, tangents: Tensor) -> Tensor:
    """Σ W·q·ż, ż (B, H, W): η times its gradient by what q depends on is that of the clean loss after a step of size η.

    With g after that step; to first order in η with g before it.
    """
    return (targets.weights * targets.foreground * tangents).sum()


def meta_update(
    optimizer: torch.optim.Optimizer, targets: Targets, tangents: Tensor, beside: Tensor | float
) -> Targets:
    """Move what q depends on along the meta-gradient, and down a loss `beside` it; the targets as they were before.

    The meta-loss is divided by Σ W·|ż|, so that it lies between −1 and 1 whatever the size of g.
    """
    size = (targets.weights * tangents.abs()).sum().clamp(min=torch.finfo(tangents.dtype).tiny)
    optimizer.zero_grad()
    (meta_loss(targets, tangents) / size + beside).backward()
    optimizer.step()
    return targets._replace(foreground=targets.foreground.detach())


def posterior(relative: Tensor, table: Tensor, bins: Tensor) -> Tensor:
    """P(foreground | network, bin) (B, H, W) of calibrated logits (B, 2, H, W) and unnormalised log P(bin | class)."""
    evidence = table.log_softmax(1)
    odds = (evidence[1] - evidence[0])[torch.where(valid_pixels(bins), bins, 0).long()]
    return (relative[:, 1] - relative[:, 0] + odds).sigmoid()


def signed_distances(mask: np.ndarray) -> np.ndarray:
    """(H, W) distances in pixels to the contour of a mask (H, W) that has both classes, below 0 inside."""
    inside, outside = (
        cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for part in (mask, ~mask)
    )
    return np.where(mask, 0.5 - inside, outside - 0.5)  # from the centre of a pixel to the contour between two


def contour_shift(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """By how much the predicted contour must grow to meet the true one, pixels; None where either mask is of one class.

    Both (H, W) bool. It is the mean, over pixels just outside the true contour, of how much farther the predicted is.
    """
    if any(mask.all() or not mask.any() for mask in (predicted, true)):
        return None
    return float(signed_distances(predicted)[signed_distances(true) == 0.5].mean() - 0.5)


def moved(predicted: np.ndarray, shift: float) -> np.ndarray:
    """A mask (H, W) bool, its contour moved outward by `shift` pixels; a mask of one class as it is."""
    if predicted.all() or not predicted.any():
        return predicted
    return signed_distances(predicted) <= shift


def early_learning_ended(ious: Sequence[float]) -> bool:
    """Whether f(t) = a·(1 − exp(−t^b / c)), fitted to the IoU at t = 1, 2, …, has lost 0.9 of its slope at t = 1."""
    if len(ious) < 4:
        return False

    def curve(t: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a * (1 - np.exp(-(t**b) / c))

    times = np.arange(1.0, len(ious) + 1)
    try:
        (a, b, c), _ = curve_fit(curve, times, ious, p0=(0.9, 0.9, 1.0), bounds=([0, 0, 1e-6], [1, 1, np.inf]))
    except RuntimeError:  # no fit
        return False
    slope = a * b / c * times ** (b - 1) * np.exp(-(times**b) / c)
    return bool(slope[0] > 0 and abs(slope[-1] - slope[0]) / slope[0] > ADELE_SLOPE)


def over_scales(network: nn.Module, images: Tensor, multiple: int) -> Tensor:
    """p (B, H, W), averaged over sizes of the image that are the nearest multiples to those of ADELE_SCALES."""
    side = images.shape[-1]
    sizes = [round(scale * side / multiple) * multiple for scale in ADELE_SCALES]
    resized = [F.interpolate(images, (size, size), mode="bilinear", align_corners=False) for size in sizes]
    maps = [network(each).sigmoid() for each in resized]
    back = [F.interpolate(p, (side, side), mode="bilinear", align_corners=False)[:, 0] for p in maps]
    return torch.stack(back).mean(0)


class HeldOutImages(NamedTuple):
    """Clean images (B, 3, H, W) that are not learned from, and their masks (B, H, W)."""

    images: Tensor
    truth: Tensor
    drawn: Tensor
    """The truth where nobody has drawn one."""
    fold: Tensor
    """(B,) int64 which fold of the clean images each is in."""


@dataclass(frozen=True)
class Seen:
    """What a variant is shown of a step after the warm-up."""

    noisy: Batch
    held_out: HeldOutImages | None
    """Of variants that take a gradient, else None."""
    beside: Batch | None
    """Clean images that this step learns from too."""
    share: float
    """Of theirs in the loss."""


class Variant:
    """Labels as drawn, and the base of the others."""

    takes_gradient = False
    """Whether it needs clean images that are held out throughout, and therefore learns from half of them alone."""

    def __init__(self, trainer: Trainer, drawn_known: bool) -> None:
        """drawn_known: whether the clean images have drawn masks."""
        self.trainer, self.model, self.drawn_known = trainer, trainer.model, drawn_known
        self.network, self.placement = StatelessNetwork(trainer.model, Whole(trainer.model)), Whole(trainer.model)
        self.notes: dict[str, float] = {}
        """Of the last step, for the file."""

    def targets(self, seen: Seen) -> Targets:
        """For the noisy images of a step after the warm-up."""
        return uniform(seen.noisy.masks)

    def watch(self, noisy: Batch, logits: Tensor) -> None:
        """What the network says of each step's noisy images, (B, 1, H, W), before the update."""

    def updated(self) -> None:
        """The parameters have been updated."""

    def mean_gradient(self, images: Tensor, masks: Tensor, at: Parameters | None = None) -> Parameters:
        """∇ of the mean cross-entropy at the present parameters, or at others: g, of clean images."""
        parameters = at or self.placement.trainable()
        return mean_gradient(self.network, parameters, [(images, masks)], OneProcess()).gradient

    def clean_gradient(self, seen: Seen) -> Parameters:
        return self.mean_gradient(seen.held_out.images, seen.held_out.truth)

    def along(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """z and ż (B, 1, H, W) of the noisy images along g, at the present parameters."""
        return logits_along(self.network, self.placement.trainable(), self.clean_gradient(seen), seen.noisy.images)

    def copied(self) -> nn.Module:
        """The network as it is, apart from the one that is trained."""
        twin = build_model(self.trainer.config.model).to(self.trainer.runtime.device)
        twin.load_state_dict(self.model.state_dict())
        return twin.requires_grad_(False)


class UniformHalf(Variant):
    takes_gradient = True  # and does nothing with it


class HeldOutGradient(Variant):
    takes_gradient = True

    def targets(self, seen: Seen) -> Targets:
        logits, tangents = self.along(seen)
        [weights] = shares(alignment(logits, tangents, seen.noisy.masks))
        return Targets(weights, as_foreground(seen.noisy.masks))


class GradientAfterStep(HeldOutGradient):
    """θ̂ = θ − ‖Δθ‖/‖∇L‖ · ∇L, L the loss of the step if weights were uniform, Δθ the optimiser's last update."""

    def __init__(self, trainer: Trainer, drawn_known: bool) -> None:
        super().__init__(trainer, drawn_known)
        self.before = {name: value.clone() for name, value in self.placement.trainable().items()}
        self.length = torch.zeros(())

    def clean_gradient(self, seen: Seen) -> Parameters:
        parameters = self.placement.trainable()
        step = self.mean_gradient(seen.noisy.images, seen.noisy.masks)
        if seen.beside:
            clean = self.mean_gradient(seen.beside.images, seen.beside.masks)
            step = {name: torch.lerp(value, clean[name], seen.share) for name, value in step.items()}
        rate = self.length / norm(step, OneProcess()).clamp(min=1e-12)
        ahead = {name: value - rate * step[name] for name, value in parameters.items()}
        return self.mean_gradient(seen.held_out.images, seen.held_out.truth, ahead)

    def updated(self) -> None:
        now = self.placement.trainable()
        self.length = norm({name: value - self.before[name] for name, value in now.items()}, OneProcess())
        self.before = {name: value.clone() for name, value in now.items()}


class WithLabelModel(Variant):
    """Keeps the label model of the preset going, which learns as it does there."""

    takes_gradient = True

    def __init__(self, trainer: Trainer, drawn_known: bool) -> None:
        super().__init__(trainer, drawn_known)
        assert isinstance(trainer.method.label_model, Corrected)
        self.label_model: Corrected = trainer.method.label_model

    def corrected(self, seen: Seen, logits: Tensor) -> Tensor:
        """The label model's labels, as drawn until it corrects. It learns from the step, as in the preset."""
        model, held_out, masks = self.label_model, None, seen.noisy.masks
        if seen.beside is None:
            with torch.no_grad():
                held_out = HeldOut(
                    self.model(seen.held_out.images), seen.held_out.truth, seen.held_out.fold, seen.held_out.drawn
                )
        labels, evidence = model.correct(logits, masks, model.bins(masks), held_out)
        model.learn(evidence, torch.tensor(False), lr=0.0)
        self.notes["corrects"] = model.corrects.item()
        return labels


class BothLabels(WithLabelModel):
    def targets(self, seen: Seen) -> Targets:
        masks = seen.noisy.masks
        logits, tangents = self.along(seen)
        corrected = self.corrected(seen, logits)
        if not self.label_model.corrects:
            corrected = torch.where(valid_pixels(masks), (logits[:, 0] > 0).to(masks.dtype), masks)
        return of_both_labels(logits, tangents, masks, corrected)


class LearnedCounts(WithLabelModel):
    """The table, of distances in sizes of objects, starts from the label model's when that has waited and settled."""

    table: Tensor | None = None

    def targets(self, seen: Seen) -> Targets:
        masks, model = seen.noisy.masks, self.label_model
        logits, tangents = self.along(seen)
        self.corrected(seen, logits)
        if self.table is None and model.known >= model.decide_after:
            self.start = log_likelihood(model.counts[0]).float()
            self.table = self.start.clone().requires_grad_()
            self.optimizer = torch.optim.Adam([self.table], lr=TABLE_RATE)
        if self.table is None:
            return uniform(masks)
        relative = calibrated(relative_logits(logits), model.theta[0])
        targets = uniform(masks, posterior(relative, self.table, model.bins(masks)[0]))
        targets = meta_update(self.optimizer, targets, tangents[:, 0], beside=0.0)
        self.notes["table moved"] = (self.table.detach() - self.start).abs().mean().item()
        return targets


class EmaTeacher(Variant):
    """The teacher is an exponential moving average of the parameters, from the end of the warm-up on."""

    teacher: nn.Module | None = None

    def targets(self, seen: Seen) -> Targets:
        return uniform(seen.noisy.masks, (as_foreground(seen.noisy.masks) + self.taught(seen.noisy.images)) / 2)

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """The teacher's p (B, H, W)."""
        if self.teacher is None:
            self.teacher = self.copied()
        return self.teacher(images)[:, 0].sigmoid()

    @torch.no_grad()
    def updated(self) -> None:
        if self.teacher is not None:
            for average, now in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                average.lerp_(now, 1 - TEACHER_DECAY)


class Gate(EmaTeacher):
    takes_gradient = True

    def __init__(self, trainer: Trainer, drawn_known: bool) -> None:
        super().__init__(trainer, drawn_known)
        last = nn.Conv2d(16, 1, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, GATE_START)
        self.mlp = nn.Sequential(nn.Conv2d(self.model.head.in_channels + 2, 16, 1), nn.ReLU(), last)
        self.optimizer = torch.optim.Adam(self.mlp.parameters(), lr=GATE_RATE)

    def targets(self, seen: Seen) -> Targets:
        noisy, held_out = seen.noisy, seen.held_out
        _, tangents = self.along(seen)
        drawn, taught = as_foreground(noisy.masks), self.taught(noisy.images)
        kept = self.logits_of_gate(noisy.images, drawn, taught).sigmoid()
        targets = uniform(noisy.masks, kept * drawn + (1 - kept) * taught)
        known: Tensor | float = 0.0
        if self.drawn_known:
            right = uniform(held_out.drawn, (held_out.drawn == held_out.truth).float())
            own = self.logits_of_gate(held_out.images, as_foreground(held_out.drawn), self.taught(held_out.images))
            known = right.loss(own[:, None])
        self.notes["mean r"] = kept.mean().item()
        return meta_update(self.optimizer, targets, tangents[:, 0], beside=known)

    def logits_of_gate(self, images: Tensor, drawn: Tensor, taught: Tensor) -> Tensor:
        """(B, H, W): log r / (1 − r)."""
        given = torch.cat([self.features(images), drawn[:, None], taught[:, None]], 1)
        return self.mlp(given)[:, 0]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the last layer is given, (B, F, H, W)."""
        kept: list[Tensor] = []
        handle = self.model.head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            self.model(images)
        finally:
            handle.remove()
        return kept[0]


class SpatialCorrection(Variant):
    corrector: nn.Module | None = None
    rounds = 0

    @torch.no_grad()
    def targets(self, seen: Seen) -> Targets:
        if self.rounds == 0 or (self.rounds == 1 and seen.beside):
            self.corrector, self.rounds = self.copied(), self.rounds + 1
            self.shift = self.shift_of_clean(self.corrector)
            self.notes[f"shift of round {self.rounds}"] = self.shift
        predicted = (self.corrector(seen.noisy.images)[:, 0] > 0).numpy()
        labels = np.stack([moved(each, self.shift) for each in predicted])
        return uniform(seen.noisy.masks, torch.from_numpy(labels).float())

    def shift_of_clean(self, network: nn.Module) -> float:
        """The mean over all clean images, none of which has been learned from; 0 where it is known of none."""
        config, runtime = self.trainer.config, self.trainer.runtime
        shifts = [
            contour_shift((network(batch.images)[0, 0] > 0).numpy(), batch.true_masks[0].numpy() == 1)
            for batch in evaluation_batches(self.trainer.splits.clean, config.data, runtime.shard, 1, runtime.device)
        ]
        known = [shift for shift in shifts if shift is not None]
        return statistics.fmean(known) if known else 0.0


class Adele(Variant):
    kept: nn.Module | None = None
    """The network of when early learning ended."""

    def __init__(self, trainer: Trainer, drawn_known: bool) -> None:
        super().__init__(trainer, drawn_known)
        self.ious: list[float] = []
        self.overlap, self.steps = torch.zeros(2), 0
        self.interval = max(1, trainer.steps // ADELE_TIMES)

    def watch(self, noisy: Batch, logits: Tensor) -> None:
        predicted, drawn = (logits[:, 0] > 0) & valid_pixels(noisy.masks), noisy.masks == 1
        self.overlap += torch.stack([(predicted & drawn).sum(), (predicted | drawn).sum()])
        self.steps += 1
        if self.steps % self.interval:
            return
        self.ious.append((self.overlap[0] / self.overlap[1].clamp(min=1)).item())
        self.overlap.zero_()
        if self.kept is None and early_learning_ended(self.ious):
            self.kept = self.copied()
            self.notes["early learning ended at step"] = self.steps

    @torch.no_grad()
    def targets(self, seen: Seen) -> Targets:
        drawn = as_foreground(seen.noisy.masks)
        if self.kept is None:
            return uniform(seen.noisy.masks)
        p = over_scales(self.kept, seen.noisy.images, 2**self.trainer.config.model.depth)
        sure = (p > ADELE_SURE) | (p < 1 - ADELE_SURE)
        return uniform(seen.noisy.masks, torch.where(sure, (p > 0.5).float(), drawn))


VARIANTS: dict[str, type[Variant] | None] = {
    "uniform": Variant,
    "uniform_half": UniformHalf,
    "label_correction": None,
    "held_out_gradient": HeldOutGradient,
    "gradient_after_step": GradientAfterStep,
    "both_labels": BothLabels,
    "gate": Gate,
    "learned_counts": LearnedCounts,
    "ema_teacher": EmaTeacher,
    "spatial_correction": SpatialCorrection,
    "adele": Adele,
}
"""None: the trainer's own method."""


class TargetStep(Step):
    """A step of the noisy images of a batch, which come first, and of the clean ones beside them."""

    def __init__(self, batch: Batch, noisy: Batch, targets: Targets, variant: Variant) -> None:
        super().__init__([MicroBatch(batch, None)], CrossEntropy(), OneProcess())
        self.noisy, self.targets, self.variant = noisy, targets, variant

    def loss(self, index: int, logits: Tensor, scale: float = 1.0) -> Tensor:
        self.variant.watch(self.noisy, logits[: len(self.noisy.masks)].detach())
        return scale * self.targets.loss(logits)

    def finish(self, skipped: Tensor, lr: float) -> Diagnostics:
        self.variant.updated()
        return {}


class Screen:
    """Makes the steps of a variant, with the phases and streams of the trainer's own method."""

    def __init__(self, trainer: Trainer, variant: type[Variant]) -> None:
        config, clean = trainer.config, trainer.splits.clean
        noise = trainer.folder.path / "noise_of_clean"
        drawn, _ = write_noisy_masks(clean, config.data.noise, noise, config.data.decoding)
        self.variant = variant(trainer, all(sample.annotations for sample in drawn))
        self.phases = trainer.method.phases

        def stream(name: str, samples: Sequence[Sample], labels: Labels) -> Stream:
            size, shard = config.train.clean_batch_size, trainer.runtime.shard
            device = trainer.runtime.device
            opened = Stream(samples, labels, name, config.data, config.seed, shard, size, 1, device)
            trainer.streams.append(opened)
            return opened

        self.all_clean, self.half = stream("clean", drawn, "noisy"), stream("held_out", drawn[1::2], "noisy")
        """What is held out for a gradient before clean images are learned from, and then."""
        self.beside = stream("clean", clean[::2] if variant.takes_gradient else clean, "true")
        self.folds = trainer.method.folds
        self.wrong: list[dict[str, float]] = []
        """Of each step after the warm-up, where the truth is known."""

    def begin(self, index: int, diagnose: bool) -> Step:
        phase = self.phases.at(index)
        noisy, share = phase.noisy.batch(index, 0), phase.clean_share or 0.0
        beside = self.beside.batch(index, 0) if share else None
        targets = uniform(noisy.masks)
        if phase.main:
            held_out = None
            if self.variant.takes_gradient:
                batch = (self.half if beside else self.all_clean).batch(index, 0)
                fold = torch.tensor([self.folds[id] for id in batch.ids])
                held_out = HeldOutImages(batch.images, batch.true_masks, batch.masks, fold)
            targets = self.variant.targets(Seen(noisy, held_out, beside, share))
            if noisy.true_masks is not None:
                self.wrong.append(wrong_shares(noisy, targets))
        if beside is None:
            return TargetStep(noisy, noisy, targets, self.variant)
        clean = uniform(beside.masks)
        both = Targets(
            torch.cat([(1 - share) * targets.weights, share * clean.weights]),
            torch.cat([targets.foreground, clean.foreground]),
        )
        images, masks = (torch.cat([getattr(noisy, name), getattr(beside, name)]) for name in ("images", "masks"))
        return TargetStep(Batch(images, masks, None, noisy.ids + beside.ids), noisy, both, self.variant)


def wrong_shares(noisy: Batch, targets: Targets) -> dict[str, float]:
    """Of pixels of known truth: those drawn wrong, those that targets make wrong, and the loss's weight for the wrong
    class."""
    known = valid_pixels(noisy.masks) & valid_pixels(noisy.true_masks)
    truth, count = as_foreground(noisy.true_masks), known.sum()
    mass = (targets.weights * known).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "drawn": ((noisy.masks != noisy.true_masks) & known).sum().div(count).item(),
        "learned": (((targets.foreground > 0.5) != (truth > 0.5)) & known).sum().div(count).item(),
        "weight": ((targets.foreground - truth).abs() * targets.weights * known).sum().div(mass).item(),
    }


def dice(trainer: Trainer, samples: Sequence[Sample]) -> float:
    return float(image_scores(trainer.score(samples, own=False).network)["dice"].mean())


def run(arguments: argparse.Namespace, runtime: Runtime, seed: int, name: str) -> dict[str, Any]:
    """One row: what a variant ends with. Raises FloatingPointError where a loss or a gradient is not finite."""
    keys = [f"data.root={arguments.data}", f"seed={seed}", f"train.steps={arguments.steps}", *BUDGET, *arguments.set]
    config = load_config(ROOT / "configs" / "isic2017.yaml", keys)
    kind, began = VARIANTS[name], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), runtime)
        screen = Screen(trainer, kind) if kind else None
        validated, wrong = [], screen.wrong if screen else []
        for index in range(trainer.steps):
            rate = learning_rate(config.optim, index, trainer.steps)
            outcome = train_step(trainer.engine, screen or trainer.method, index, rate, diagnose=True)
            if outcome.bad.any():
                raise FloatingPointError(f"{name}, seed {seed}, step {index + 1}: loss or gradient is not finite")
            if "noise_rate" in outcome.diagnostics:
                drawn, learned = (outcome.diagnostics[of].item() for of in ("noise_rate", "corrected_noise_rate"))
                wrong.append({"drawn": drawn, "learned": learned, "weight": learned})
            if trainer.cadence.validates(index + 1):
                validated.append(dice(trainer, trainer.splits.val))
        test = dice(trainer, trainer.splits.test)
        trainer.close()
    means = {f"wrong_{of}": statistics.fmean(row[of] for row in wrong) if wrong else None for of in WRONG}
    scores = {"val_dice": validated[-1], "best_val_dice": max(validated), "test_dice": test}
    notes = screen.variant.notes if screen else {}
    return {"seed": seed, "variant": name, **scores, **means, "seconds": time.monotonic() - began, "notes": notes}


WRONG = ("drawn", "learned", "weight")
COLUMNS = {
    "val_dice": "val Dice",
    "best_val_dice": "best val Dice",
    "test_dice": "test Dice",
    "wrong_drawn": "wrong as drawn",
    "wrong_learned": "wrong as learned",
    "wrong_weight": "weight on wrong",
    "seconds": "seconds",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every run; then, of several seeds, means, and how much val Dice differs from that of `uniform`."""
    lines = ["| variant | seed | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| `{row['variant']}` | {row['seed']} | {_cells(row)} |" for row in rows]
    baseline = {row["seed"]: row["val_dice"] for row in rows if row["variant"] == "uniform"}
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        if len(own) == 1:
            continue
        means = {key: _mean([row[key] for row in own]) for key in COLUMNS}
        gains = [row["val_dice"] - baseline[row["seed"]] for row in own if row["seed"] in baseline]
        gain = f", {statistics.fmean(gains):+.3f} ± {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
        lines.append(f"| `{name}` | mean of {len(own)}{gain} | {_cells(means)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _cells(row: dict[str, Any]) -> str:
    return " | ".join("–" if row[key] is None else f"{row[key]:.{0 if key == 'seconds' else 3}f}" for key in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with manifest.csv")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20])
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="keys of the config")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and go on with those it has")
    arguments = parser.parse_args()
    setting = {"data": arguments.data.name, "steps": arguments.steps, "set": arguments.set}
    result: dict[str, Any] = {"machine": describe_machine("cpu"), "setting": setting, "rows": []}
    if arguments.json and arguments.json.exists():
        result = json.loads(arguments.json.read_text())
        if result["setting"] != setting:
            parser.error(f"{arguments.json} has runs of {result['setting']}; choose another file")
    rows = result["rows"]
    done = {(row["seed"], row["variant"]) for row in rows}
    runtime = start_runtime()
    for seed in arguments.seeds:
        for name in arguments.variants:
            if (seed, name) in done:
                continue
            rows.append(run(arguments, runtime, seed, name))
            print(f"seed {seed}, {name}: val Dice {rows[-1]['val_dice']:.3f}", file=sys.stderr, flush=True)
            if arguments.json:
                write_atomically(arguments.json, json.dumps(result, indent=2) + "\n")
    stop_runtime()
    print(table(rows))


if __name__ == "__main__":
    main()
