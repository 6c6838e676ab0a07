"""One training step of a method: what is shown to the network, what it costs, and what the method learns from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distseg.data.batch import Batch
from distseg.meta.reduction import Reduction
from distseg.meta.weights import Diagnostics, WeightMap
from distseg.methods.part import HeldOut, LabelModel, Loss, Weighed, Weighting
from distseg.ops import valid_pixels


@dataclass(frozen=True)
class Drawn:
    """The noisy images of a micro-batch, which come first in it, for a label model."""

    count: int
    bins: Tensor
    """(count, H, W) of their masks: `LabelModel.bins`."""
    labels: Tensor | None = None
    """(count, H, W) where they had to be known before the pass; None where they follow from its logits."""
    held_out: HeldOut | None = None
    """Clean images beside them, as long as the network has not learned from any."""
    truth: Tensor | None = None
    """(count, H, W) their true masks, where there are any, for diagnostics."""


@dataclass(frozen=True)
class MicroBatch:
    """This rank's images of one forward pass, the noisy ones first, and the weights of their pixels."""

    batch: Batch
    """Its masks are as drawn."""
    weights: WeightMap
    """The weights of a step sum to 1 over micro-batches and ranks."""
    drawn: Drawn | None = None
    """What a label model may correct; None where there is none, or no noisy image."""


class Step:
    """Made by `Method.begin`. `loss` may be called any number of times; only `finish` changes the method."""

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        reduction: Reduction,
        *,
        weighting: Weighting | None = None,
        weighed: Weighed | None = None,
        label_model: LabelModel | None = None,
        diagnose: bool = False,
    ) -> None:
        self.micro_batches = micro_batches
        self._loss, self._reduction = loss, reduction
        self._weighting, self._weighed = weighting, weighed
        self._label_model, self._diagnose = label_model, diagnose
        # By micro-batch, so that a second call of `loss` replaces what the first one found.
        self._loss_evidence: dict[int, Tensor] = {}
        self._label_evidence: dict[int, Tensor] = {}
        self._wrong: dict[int, Tensor] = {}

    def loss(self, index: int, logits: Tensor, scale: float = 1.0) -> Tensor:
        """scale · Σ W·ℓ of micro-batch `index`, a scalar, from its logits (B, C, H, W).

        The factor goes into the weights, which spares the gradient of the loss a pass.
        """
        micro = self.micro_batches[index]
        labels = micro.batch.masks
        if self._label_model and micro.drawn:
            labels = self._labels(index, self._label_model, micro.batch, micro.drawn, logits.detach())
        loss, evidence = self._loss.terms(logits, labels, micro.weights.times(scale))
        if evidence is not None:
            self._loss_evidence[index] = evidence / scale
        return loss

    def finish(self, skipped: Tensor, lr: float) -> Diagnostics:
        """Let the method learn from the step, unless it was skipped; diagnostics are 0-dim tensors by name.

        skipped: a boolean scalar on the device, the same on every rank; nothing here waits for it. Every rank calls
        this once, after `loss` of every micro-batch. One reduction over ranks, if anything is learned at all.
        """
        diagnostics: Diagnostics = {}
        if self._weighting and self._weighed:
            diagnostics |= self._weighed.diagnostics
            diagnostics |= self._weighting.learn(self._weighed.evidence, skipped, lr)
        found = [self._loss_evidence, self._label_evidence, self._wrong]
        loss_evidence, label_evidence, wrong = self._summed([list(each.values()) for each in found])
        if loss_evidence is not None:
            diagnostics |= self._loss.learn(loss_evidence, skipped, lr)
        if self._label_model and label_evidence is not None:
            diagnostics |= self._label_model.learn(label_evidence, skipped, lr)
        if wrong is not None:
            known, drawn, learned = wrong
            diagnostics |= {"noise_rate": drawn / known, "corrected_noise_rate": learned / known}
        return diagnostics

    def _summed(self, found: Sequence[list[Tensor]]) -> list[Tensor | None]:
        """Each list of vectors added up over micro-batches and ranks, in one reduction; None for an empty list."""
        own = [torch.stack(vectors).sum(0) for vectors in found if vectors]
        sums = iter(self._reduction.sum(torch.cat(own)).split([len(each) for each in own]) if own else ())
        return [next(sums) if vectors else None for vectors in found]

    def _labels(self, index: int, model: LabelModel, batch: Batch, drawn: Drawn, logits: Tensor) -> Tensor:
        """What to learn from, (B, H, W): the noisy images' labels by the label model, the clean ones' as they are."""
        masks, rest = batch.masks[: drawn.count], batch.masks[drawn.count :]
        found = model.correct(logits[: drawn.count], masks, drawn.bins, drawn.held_out)
        labels, self._label_evidence[index] = found
        if drawn.labels is not None:
            labels = drawn.labels
        if self._diagnose and drawn.truth is not None:
            self._wrong[index] = _wrong_pixels(masks, labels, drawn.truth)
        return torch.cat([labels, rest])


def _wrong_pixels(drawn: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """(3,) float64: pixels of known truth, those drawn wrong, and those that are wrong in `labels`."""
    known = valid_pixels(drawn) & valid_pixels(truth)
    counts = [known.sum(), (known & (drawn != truth)).sum(), (known & (labels != truth)).sum()]
    return torch.stack(counts).double()
