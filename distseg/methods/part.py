"""What the parts of a method are to it: a weighting, a loss, and a label model where labels are corrected.

A part keeps between steps only what `state_dict` holds. It changes that in one place, `learn`, which is told on the
device whether the step was skipped.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from distseg.meta.estimators import LabelledImages
from distseg.meta.weights import Diagnostics, WeightMap


class Part:
    """A part that learns nothing, unless it says otherwise."""

    def learn(self, evidence: Any, skipped: Tensor, lr: float) -> Diagnostics:
        """Learn from a step's evidence; keep what was where `skipped`, a boolean scalar on the device, is true.

        Diagnostics are 0-dim tensors by name. `lr` is the network's learning rate.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What the part has learned, the same on every rank, by name."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; the tensors may be on any device."""


class Weighed(NamedTuple):
    """The weight maps of a step's noisy micro-batches; they sum to 1 over micro-batches and ranks, or to less."""

    maps: list[WeightMap]
    diagnostics: Diagnostics
    evidence: Any = None
    """What `Weighting.learn` is given."""


class Weighting(Part, ABC):
    @abstractmethod
    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None,
    ) -> Weighed:
        """Weights of the noisy micro-batches. True masks serve only diagnostics: without them there are fewer."""


class Loss(Part, ABC):
    class_weights: Tensor | None = None
    """(classes,) what multiplies the cross-entropy of each label, for weights that are found with it; None: 1 each."""

    @abstractmethod
    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, Tensor | None]:
        """Σ W·ℓ of one micro-batch, a scalar, and the evidence that the loss learns from.

        Both are sums over images, and c·W gives c times as much: that is all that accumulation and ranks need.
        logits (B, C, H, W); labels (B, H, W) class ids, 255 = ignore. The evidence is a float64 vector or None; `learn`
        gets its sum over micro-batches and ranks.
        """


class HeldOut(NamedTuple):
    """Clean images that the network has not learned from: its logits (B, C, H, W) and their masks (B, H, W)."""

    logits: Tensor
    masks: Tensor


class LabelModel(Part, ABC):
    @abstractmethod
    def bins(self, masks: Tensor) -> Tensor:
        """What of drawn masks (B, H, W) a label depends on, (B, H, W) uint8."""

    @abstractmethod
    def correct(self, logits: Tensor, masks: Tensor, bins: Tensor, held_out: HeldOut | None) -> tuple[Tensor, Tensor]:
        """The label of each pixel, (B, H, W) like `masks`, 255 = ignore; and what the model learns from.

        That is a float64 vector that adds up over images, micro-batches and ranks.
        """
