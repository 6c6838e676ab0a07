"""Soft Dice beside cross-entropy: for lesions so small that cross-entropy alone is content to mark nothing.

The Dice of Milletari, Navab and Ahmadi 2016, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
Segmentation", beside cross-entropy as in nnU-Net (Isensee et al. 2021), under the weight map and image by image:

    Σ_p W_p [(1 − λ) v_y ℓ_p + λ (1 − D)],   D the Dice under W of the image that p is of, a mean over its classes

D does not depend on the size of W, so that the loss is as large under any weighting as cross-entropy is, and sums over
images alone join micro-batches and ranks. An image without foreground adds nothing to the Dice term (Tilborghs et al.
2022, "The Dice loss in the context of missing or empty labels", on what a Dice of such images does).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from distseg.meta.weights import WeightMap
from distseg.methods.context import Context
from distseg.methods.losses.class_weights import ClassWeights, class_weights_on
from distseg.methods.part import Loss
from distseg.ops import dice_cross_entropy
from distseg.section import Fraction, Section


class DiceCrossEntropyConfig(Section):
    kind: Literal["dice_cross_entropy"] = "dice_cross_entropy"
    dice: Fraction = 0.5
    """λ, the share of the Dice term; the rest is cross-entropy."""
    smooth: float = Field(default=1e-5, ge=0)
    """Added to both sides of the Dice's fraction, as a share of the image's weight: 1e-5 is 0.7 pixels of 256 × 256."""
    class_weights: ClassWeights = None
    """What the cross-entropy of a pixel is multiplied by, one number a class, background first; null: 1 each."""

    def build(self, context: Context) -> Loss:
        return DiceCrossEntropy(self.dice, self.smooth, class_weights_on(self.class_weights, context))


class DiceCrossEntropy(Loss):
    def __init__(self, dice: float, smooth: float, class_weights: Tensor | None) -> None:
        self.dice, self.smooth, self.class_weights = dice, smooth, class_weights

    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, None]:
        loss = dice_cross_entropy(
            logits, labels, *weights, dice=self.dice, smooth=self.smooth, class_weights=self.class_weights
        )
        return loss, None
