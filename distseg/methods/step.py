"""One training step of a method: what is shown to the network, what it costs, and what the method learns from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distseg.data.batch import Batch
from distseg.meta.estimators import SumOverRanks
from distseg.meta.weights import Diagnostics, WeightMap
from distseg.methods.part import LabelModel, Loss, Weighed, Weighting
from distseg.ops import valid_pixels


@dataclass(frozen=True)
class MicroBatch:
    """This rank's images of one forward pass, the noisy ones first, and the weights of their pixels."""

    batch: Batch
    """Its masks are as drawn."""
    weights: WeightMap
    """The weights of a step sum to 1 over micro-batches and ranks."""
    noisy: int = 0
    """How many of the images are noisy ones, whose labels a label model may correct."""
    bins: Tensor | None = None
    """Of the noisy ones' drawn masks; None without a label model."""
    labels: Tensor | None = None
    """Of the noisy ones, where they had to be known before the pass; None where they follow from its logits."""


class Step:
    """Made by `Method.begin`. `loss` may be called any number of times; only `finish` changes the method."""

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        sum_over_ranks: SumOverRanks,
        *,
        weighting: Weighting | None = None,
        weighed: Weighed | None = None,
        label_model: LabelModel | None = None,
        correct: bool = False,
        diagnose: bool = False,
    ) -> None:
        self.micro_batches = micro_batches
        self._loss, self._sum_over_ranks = loss, sum_over_ranks
        self._weighting, self._weighed = weighting, weighed
        self._label_model, self._correct, self._diagnose = label_model, correct, diagnose
        # By micro-batch, so that a second call of `loss` replaces what the first one found.
        self._loss_evidence: dict[int, Tensor] = {}
        self._label_evidence: dict[int, Tensor] = {}
        self._wrong: dict[int, Tensor] = {}

    def loss(self, index: int, logits: Tensor, scale: float = 1.0) -> Tensor:
        """scale · Σ W·ℓ of micro-batch `index`, a scalar, from its logits (B, C, H, W).

        The factor goes into the weights, which spares the gradient of the loss a pass.
        """
        micro = self.micro_batches[index]
        labels = self._labels(index, logits.detach()) if self._label_model and micro.noisy else micro.batch.masks
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
        sums = iter(self._sum_over_ranks(torch.cat(own)).split([len(each) for each in own]) if own else ())
        return [next(sums) if vectors else None for vectors in found]

    def _labels(self, index: int, logits: Tensor) -> Tensor:
        """What to learn from, (B, H, W): the noisy images' labels by the label model, the clean ones' as they are."""
        micro, model = self.micro_batches[index], self._label_model
        logits, drawn = logits[: micro.noisy], micro.batch.masks[: micro.noisy]
        self._label_evidence[index] = model.evidence(logits, drawn, micro.bins)
        if not self._correct:
            labels = drawn
        else:
            labels = model.labels(logits, drawn, micro.bins) if micro.labels is None else micro.labels
        if self._diagnose:
            self._wrong[index] = _wrong_pixels(drawn, labels, micro.batch.true_masks[: micro.noisy])
        return torch.cat([labels, micro.batch.masks[micro.noisy :]])


def _wrong_pixels(drawn: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """(3,) float64: pixels of known truth, those drawn wrong, and those that are wrong in `labels`."""
    known = valid_pixels(drawn) & valid_pixels(truth)
    counts = [known.sum(), (known & (drawn != truth)).sum(), (known & (labels != truth)).sum()]
    return torch.stack(counts).double()
