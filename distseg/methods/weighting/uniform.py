"""Every valid pixel counts the same."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from distseg.meta.estimators import LabelledImages
from distseg.meta.reduction import Reduction
from distseg.meta.weights import uniform_weights
from distseg.methods.context import Context
from distseg.methods.part import Weighed, Weighting
from distseg.section import Section


class UniformConfig(Section):
    kind: Literal["uniform"] = "uniform"

    needs_clean: ClassVar[bool] = False
    by_pixel: ClassVar[bool] = False

    def build(self, context: Context, class_weights: Tensor | None) -> Weighting:
        return Uniform(context.reduction)


class Uniform(Weighting):
    """W = 1/N on each of the N valid pixels of the global batch."""

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None,
    ) -> Weighed:
        masks, dtype = [labels for _, labels in noisy], noisy[0][0].dtype
        return Weighed(uniform_weights(masks, self.reduction, dtype), {})
