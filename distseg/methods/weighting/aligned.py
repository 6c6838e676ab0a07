"""A pixel counts by how well its gradient agrees with the clean gradient at the present parameters.

Per pixel: Mirikharaji, Yan, Hamarneh 2019, "Learning to Segment Skin Lesions from Noisy Annotations". Per image: Ren,
Zeng, Yang, Urtasun 2018, "Learning to Reweight Examples for Robust Deep Learning".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from distseg.meta import PixelReweighter
from distseg.meta.estimators import LabelledImages, MeanLoss
from distseg.meta.weights import Granularity
from distseg.methods.context import Context
from distseg.methods.part import PendingWeights, Weighed, Weighting
from distseg.section import Section


def _known_granularity(text: str) -> str:
    Granularity.parse(text)
    return text


class AlignedConfig(Section):
    kind: Literal["aligned"] = "aligned"
    estimator: Literal["forward", "reverse", "finite"] = "forward"
    """forward (exact) | reverse (exact, the paper's double backward) | finite (for operators without forward mode)."""
    granularity: Annotated[str, AfterValidator(_known_granularity)] = "pixel"
    """pixel | patch(k) | image."""
    transform: Literal["clamp", "root", "sign"] = "clamp"
    """What counts where the alignment U is above 0: U itself, as in the paper, its root, or 1."""
    normalise: Literal["batch", "image"] = "batch"
    """The weights of the whole global batch sum to 1, or those of each image to 1/B."""
    on_zero: Literal["skip", "uniform"] = "skip"
    """Where no pixel has a weight: weight 0 for all, or the same for all."""
    virtual_lr: Annotated[float, Field(gt=0)] = 0.1
    """α, the size of the virtual SGD step that weights are derived through; it does not matter where the step starts at
    weights of 0, as the paper's does."""
    initial_weight: Annotated[float, Field(ge=0)] = 0.0
    """The sum of the weights that the virtual step starts with, the same on every valid pixel of the global batch."""
    one_pass: bool = True
    """Let the weighted step's own forward pass carry the tangents, which saves a pass and holds the features' tangents
    beside them. For estimator forward, float32, ZeRO 0 to 2, one micro-batch a step, and networks without activation
    checkpointing; a pass of their own elsewhere, with the same weights."""

    needs_clean: ClassVar[bool] = True

    @property
    def by_pixel(self) -> bool:
        return self.granularity != "image"

    def build(self, context: Context, class_weights: Tensor | None) -> Weighting:
        reweighter = PixelReweighter(
            context.model,
            estimator=self.estimator,
            granularity=self.granularity,
            normalise=self.normalise,
            on_zero=self.on_zero,
            transform=self.transform,
            virtual_lr=self.virtual_lr,
            initial_weight=self.initial_weight,
            class_weights=class_weights,
            reduction=context.reduction,
            placement=context.placement,
        )
        return Aligned(reweighter, self.one_pass)


class Aligned(Weighting):
    def __init__(self, reweighter: PixelReweighter, one_pass: bool) -> None:
        self.reweighter, self.one_pass = reweighter, one_pass

    def begin(self, images: Tensor, clean: Sequence[LabelledImages]) -> PendingWeights | None:
        if not (self.one_pass and self.reweighter.may_take_one_pass):
            return None
        loss = self.reweighter.clean_loss(clean)
        return _OnePass(self.reweighter, loss) if self.reweighter.takes_one_pass(loss, images) else None

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None,
    ) -> Weighed:
        loss = self.reweighter.clean_loss(clean, noisy)
        maps = self.reweighter.weigh_along(loss, noisy, true_masks)
        # With an initial weight the clean loss is at the fast weights, not at the present parameters.
        here = None if self.reweighter.initial_weight else loss
        return Weighed(maps, self.reweighter.diagnostics, clean=here)


@dataclass(frozen=True)
class _OnePass:
    """PendingWeights along the clean gradient."""

    reweighter: PixelReweighter
    clean: MeanLoss

    def forward(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.reweighter.carry(self.clean, network, images)

    def weigh(self, logits: Tensor, tangents: Tensor, masks: Tensor, true_masks: Tensor | None) -> Weighed:
        weights = self.reweighter.weigh_pass(self.clean, logits, tangents, masks, true_masks)
        return Weighed([weights], self.reweighter.diagnostics, clean=self.clean)
