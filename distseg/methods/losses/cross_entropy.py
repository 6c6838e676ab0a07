"""Cross-entropy, binary for one output channel: the loss that the paper weighs."""

from typing import Literal

from torch import Tensor

from distseg.meta.weights import WeightMap
from distseg.methods.context import Context
from distseg.methods.part import Loss
from distseg.ops import weighted_loss
from distseg.section import Section


class CrossEntropyConfig(Section):
    kind: Literal["cross_entropy"] = "cross_entropy"

    def build(self, context: Context) -> Loss:
        return CrossEntropy()


class CrossEntropy(Loss):
    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, None]:
        return weighted_loss(logits, labels, *weights), None
