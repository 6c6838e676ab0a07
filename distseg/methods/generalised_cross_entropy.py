"""Generalised cross-entropy on the noisy stream: no clean image, no weight that has to be learned.

Zhang and Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", with q =
0.7 as there and without the truncation, which prunes images by their loss.
"""

from torch import Tensor

from distseg.meta.weights import WeightMap
from distseg.methods.step import Parts
from distseg.methods.uniform import Uniform
from distseg.ops.robust import generalised_cross_entropy


class GeneralisedCrossEntropy(Uniform):
    def __init__(self, parts: Parts) -> None:
        stream = parts.noisy_stream()
        super().__init__(parts, lambda step: [stream])
        self.q = parts.config.method.q

    def loss(self, logits: Tensor, masks: Tensor, weights: WeightMap) -> Tensor:
        return (weights.full(masks) * generalised_cross_entropy(logits, masks, self.q)).sum()
