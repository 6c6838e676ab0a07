"""One training step of a method: what is shown to the network, what it costs, and what the method learns from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distseg.data.batch import Batch
from distseg.data.classes import IGNORE
from distseg.meta.estimators import MeanLoss
from distseg.meta.reduction import Reduction
from distseg.meta.weights import Diagnostics, WeightMap
from distseg.methods.part import HeldOut, LabelModel, Loss, PendingWeights, Weighed, Weighting
from distseg.ops import valid_pixels


@dataclass(frozen=True)
class Drawn:
    """The noisy images of a micro-batch, which come first in it, for a label model."""

    count: int
    bins: Any
    """Of their masks: `LabelModel.bins`."""
    known: Tensor | None = None
    """(count, 1, 1) whether an image's mask is a reference; its bins are of nothing then. None: no image's is."""
    labels: Tensor | None = None
    """(count, H, W) where they had to be known before the pass; None where they follow from its logits."""
    held_out: HeldOut | None = None
    """Clean images beside them, as long as the network has not learned from any."""
    truth: Tensor | None = None
    """(count, H, W) their true masks, where there are any, for diagnostics."""

    def correct(
        self, model: LabelModel, logits: Tensor, masks: Tensor, held_out: HeldOut | None
    ) -> tuple[Tensor, Tensor]:
        """`model.correct` of all but the references, which are their own labels."""
        if self.known is None:
            return model.correct(logits, masks, self.bins, held_out)
        labels, evidence = model.correct(logits, torch.where(self.known, IGNORE, masks), self.bins, held_out)
        return torch.where(self.known, masks, labels), evidence


@dataclass(frozen=True)
class MicroBatch:
    """This rank's images of one forward pass, the noisy ones first, and the weights of their pixels."""

    batch: Batch
    """Its masks are as drawn."""
    weights: WeightMap | None
    """The weights of a step sum to 1 over micro-batches and ranks, or with `CleanTerm.share`. None until
    `Step.forward` where they come from that pass."""
    drawn: Drawn | None = None
    """What a label model may correct; None where there is none, or no noisy image."""


@dataclass(frozen=True)
class CleanTerm:
    """The part of a step's loss that is the clean images', with its gradient, which is added to the update as it is."""

    mean: MeanLoss
    share: float
    """Of the step's loss; the micro-batches have the rest."""
    ids: tuple[str, ...]
    """This rank's clean images."""


class Step:
    """Made by `Method.begin`. For each micro-batch `forward`, then `loss`, any number of times; only `finish` changes
    the method, and no step is of use after it."""

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        reduction: Reduction,
        *,
        weighting: Weighting | None = None,
        weighed: Weighed | PendingWeights | None = None,
        clean: CleanTerm | None = None,
        label_model: LabelModel | None = None,
        diagnose: bool = False,
    ) -> None:
        self.micro_batches = list(micro_batches)
        self.clean = clean
        """What is to be added to the update of the micro-batches; None where their images are all."""
        own = tuple(each for micro in micro_batches for each in micro.batch.ids)
        self.ids = own + (clean.ids if clean else ())
        """Of this rank's images."""
        self._loss, self._reduction = loss, reduction
        self._weighting, self._weighed = weighting, weighed
        self._label_model, self._diagnose = label_model, diagnose
        # By micro-batch, so that a second call of `loss` replaces what the first one found.
        self._loss_evidence: dict[int, Tensor] = {}
        self._label_evidence: dict[int, Tensor] = {}
        self._wrong: dict[int, Tensor] = {}

    def forward(self, network: nn.Module, index: int) -> Tensor:
        """Logits (B, C, H, W) of micro-batch `index` with their graph, at least float32: what `loss` is to be given.

        One pass of `network`, which finds the weights too where they come from it.
        """
        images = self.micro_batches[index].batch.images
        if self._weighed is None or isinstance(self._weighed, Weighed):
            return _wide(network(images))
        logits, tangents = self._weighed.forward(network, images)
        self._weigh(self._weighed, index, logits.detach(), tangents)
        return _wide(logits)

    def loss(self, index: int, logits: Tensor, scale: float = 1.0) -> Tensor:
        """scale · Σ W·ℓ of micro-batch `index`, a scalar, from its logits (B, C, H, W).

        The factor goes into the weights, which spares the gradient of the loss a pass.
        """
        micro = self.micro_batches[index]
        assert micro.weights is not None, "the pass that the weights come from has not been made"
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
        self.clean = None  # a gradient's worth of memory
        if self._weighting and isinstance(self._weighed, Weighed):
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

    def _weigh(self, pending: PendingWeights, index: int, logits: Tensor, tangents: Tensor) -> None:
        """Put the weights that a pass has found where `loss` looks for them, and the labels that they are for."""
        micro = self.micro_batches[index]
        batch, drawn, labels = micro.batch, micro.drawn, micro.batch.masks
        if self._label_model and drawn:
            labels, _ = drawn.correct(self._label_model, logits, labels, None)
            drawn = replace(drawn, labels=labels)
        weighed = pending.weigh(logits, tangents, labels, batch.true_masks if self._diagnose else None)
        [weights] = weighed.maps
        if self.clean:
            weights = weights.times(1 - self.clean.share)
        self.micro_batches[index] = replace(micro, weights=weights, drawn=drawn)
        self._weighed = weighed._replace(clean=None)

    def _summed(self, found: Sequence[list[Tensor]]) -> list[Tensor | None]:
        """Each list of vectors added up over micro-batches and ranks, in one reduction; None for an empty list."""
        own = [torch.stack(vectors).sum(0) for vectors in found if vectors]
        sums = iter(self._reduction.sum(torch.cat(own)).split([len(each) for each in own]) if own else ())
        return [next(sums) if vectors else None for vectors in found]

    def _labels(self, index: int, model: LabelModel, batch: Batch, drawn: Drawn, logits: Tensor) -> Tensor:
        """What to learn from, (B, H, W): the noisy images' labels by the label model, the clean ones' as they are."""
        masks, rest = batch.masks[: drawn.count], batch.masks[drawn.count :]
        found = drawn.correct(model, logits[: drawn.count], masks, drawn.held_out)
        labels, self._label_evidence[index] = found
        if drawn.labels is not None:
            labels = drawn.labels
        if self._diagnose and drawn.truth is not None:
            self._wrong[index] = _wrong_pixels(masks, labels, drawn.truth)
        return torch.cat([labels, rest])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _wrong_pixels(drawn: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """(3,) float64: pixels of known truth, those drawn wrong, and those that are wrong in `labels`."""
    known = valid_pixels(drawn) & valid_pixels(truth)
    counts = [known.sum(), (known & (drawn != truth)).sum(), (known & (labels != truth)).sum()]
    return torch.stack(counts).double()
