"""Cross-entropy, binary for one output channel: the loss that the paper weighs."""

from typing import Literal

from torch import Tensor

from distseg.meta.weights import WeightMap
from distseg.methods.context import Context
from distseg.methods.losses.class_weights import ClassWeights, class_weights_on
from distseg.methods.part import Loss
from distseg.ops import weighted_loss
from distseg.section import Section


class CrossEntropyConfig(Section):
    kind: Literal["cross_entropy"] = "cross_entropy"
    class_weights: ClassWeights = None
    """What the loss of a pixel is multiplied by, one number a class, background first; null: 1 each."""

    def build(self, context: Context) -> Loss:
        return CrossEntropy(class_weights_on(self.class_weights, context))


class CrossEntropy(Loss):
    is_cross_entropy = True

    def __init__(self, class_weights: Tensor | None = None) -> None:
        self.class_weights = class_weights

    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, None]:
        return weighted_loss(logits, labels, *weights.by_class(labels, self.class_weights)), None
