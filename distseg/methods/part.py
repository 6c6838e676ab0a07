"""What the parts of a method are to it: a weighting, a loss, and a label model where labels are corrected.

A part keeps between steps only what `state_dict` holds. It changes that in one place, `learn`, which is told on the
device whether the step was skipped.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distseg.data.batch import EveryAnnotation
from distseg.meta.estimators import LabelledImages, MeanLoss
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
    clean: MeanLoss | None = None
    """The mean cross-entropy of the step's clean images at the present parameters, where the weights come from it."""


class PendingWeights(Protocol):
    """Weights of a step's only noisy micro-batch that wait for the logits that they weigh."""

    @property
    def clean(self) -> MeanLoss:
        """As in Weighed."""

    def forward(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C, H, W), with their graph, and their tangents, in one pass of `network`, the step's own."""

    def weigh(self, logits: Tensor, tangents: Tensor, masks: Tensor, true_masks: Tensor | None) -> Weighed:
        """What `Weighting.weigh` would say of the images; all of it constant to autograd."""


class Weighting(Part, ABC):
    def begin(
        self, images: Tensor, clean: Sequence[LabelledImages], learns_clean: bool = False
    ) -> PendingWeights | None:
        """Weights for noisy images (B, 3, H, W) from the pass that is weighed; None: `weigh` needs passes of its own.

        Called where a step has one noisy micro-batch. `learns_clean`: its update takes the gradient of `clean` too.
        """
        return None

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
    is_cross_entropy: bool = False
    """Whether Σ W·ℓ is cross-entropy under these class weights and nothing else."""

    @abstractmethod
    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, Tensor | None]:
        """Σ W·ℓ of one micro-batch, a scalar, and the evidence that the loss learns from.

        Both are sums over images, and c·W gives c times as much: that is all that accumulation and ranks need.
        logits (B, C, H, W); labels (B, H, W) class ids, 255 = ignore. The evidence is a float64 vector or None; `learn`
        gets its sum over micro-batches and ranks.
        """


FOLDS = 10
"""Of the clean images; fewer have one each."""


class HeldOut(NamedTuple):
    """Clean images that the network has not learned from: its logits (B, C, H, W) and their masks (B, H, W)."""

    logits: Tensor
    masks: Tensor
    fold: Tensor
    """(B,) int64 which of FOLDS each is in: it judges what is fitted to the others."""
    drawn: Tensor
    """(B, H, W) what one annotator has drawn of them; 255 where nobody has."""
    every: EveryAnnotation | None = None
    """What all annotators have drawn of them, of data.annotators=all."""

    def by_fold(self, of_images: Sequence[Tensor]) -> Tensor:
        """(FOLDS, D): vectors (D,), one an image, added up by fold."""
        rows = torch.stack([*of_images])
        members = self.fold == torch.arange(FOLDS, device=rows.device)[:, None]
        return members.to(rows.dtype) @ rows


class LabelModel(Part, ABC):
    @abstractmethod
    def bins(self, masks: Tensor, every: EveryAnnotation | None) -> Any:
        """What a label depends on of the drawn masks (B, H, W), and of `every` annotation where there are all.

        It is handed back to `correct`.
        """

    @abstractmethod
    def correct(self, logits: Tensor, masks: Tensor, bins: Any, held_out: HeldOut | None) -> tuple[Tensor, Tensor]:
        """The label of each pixel, (B, H, W) like `masks`, 255 = ignore; and what the model learns from.

        That is a float64 vector that adds up over images, micro-batches and ranks.
        """
