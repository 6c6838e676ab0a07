"""Generalised cross-entropy: a loss that bears wrong labels without knowing which.

Zhang and Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", with q =
0.7 as there and without the truncation, which prunes images by their loss.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from distseg.meta.weights import WeightMap
from distseg.methods.context import Context
from distseg.methods.part import Loss
from distseg.ops.robust import generalised_cross_entropy
from distseg.section import Section


class GeneralisedCrossEntropyConfig(Section):
    kind: Literal["generalised_cross_entropy"] = "generalised_cross_entropy"
    q: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Between cross-entropy (towards 0) and the mean absolute error (1)."""

    def build(self, context: Context) -> Loss:
        return GeneralisedCrossEntropy(self.q)


class GeneralisedCrossEntropy(Loss):
    def __init__(self, q: float) -> None:
        self.q = q

    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, None]:
        return (weights.full(labels) * generalised_cross_entropy(logits, labels, self.q)).sum(), None
