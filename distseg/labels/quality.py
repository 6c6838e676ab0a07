"""How good a drawn mask is, given a distribution over what each of its pixels truly is.

Probabilities (C, H, W) float, background first; mask (H, W) class ids, 255 = ignore.
"""

import torch
from torch import Tensor

from distseg.ops import valid_pixels

LEVELS = 32
"""Truths over which the expected Dice is averaged."""
TEMPERATURE = 0.1
"""Of the softmin score; its authors' value."""


def drawn_probability(probabilities: Tensor, mask: Tensor) -> Tensor:
    """(H, W): the probability of the class that was drawn; 1 where the mask is to be ignored."""
    valid = valid_pixels(mask)
    drawn = probabilities.gather(0, torch.where(valid, mask, 0).long()[None])[0]
    return torch.where(valid, drawn, 1.0)


def expected_dice(probabilities: Tensor, mask: Tensor) -> float:
    """E Dice(mask, T) over truths T that have these probabilities at each pixel.

    Dice is 2 |same class, not background| / (|not background| + |not background|), 1 where both are empty, as
    `data.agreement.dice` has it. Probabilities of pixels do not say how pixels go together, and Dice depends on it.
    T is class c at a pixel where a number u, uniform and the same for all of the image's pixels, lies in the c-th of
    the intervals that divide [0, 1] in proportion to P(1), P(2), …, P(0): of two classes the level set {P(1) > u}.
    So contours move as a whole and objects are there or not, as those of people are. With a number for each pixel
    |T| hardly varies, and the expectation comes close to 2 Σ_A p / (|A| + Σ p), which makes an object that is there
    with probability ½ look like one of half the size. The mean over u is by the midpoint rule.
    """
    valid = valid_pixels(mask)
    ends = torch.cat([probabilities[1:], probabilities[:1]])[:, valid].cumsum(0)
    drawn = mask[valid].long()
    classes = len(probabilities)
    total = 0.0
    for level in range(LEVELS):
        u = (level + 0.5) / LEVELS
        # The last interval, background's, has what rounding leaves of 1.
        truth = ((ends[:-1] <= u).sum(0) + 1) % classes
        both = ((truth == drawn) & (truth > 0)).sum().item()
        marked = (truth > 0).sum().item() + (drawn > 0).sum().item()
        total += 2 * both / marked if marked else 1.0
    return total / LEVELS


def softmin_score(probabilities: Tensor, mask: Tensor) -> float:
    """Σ s · softmax((1 − s) / 0.1) over the valid pixels, s the probability of the drawn class; 1 without any.

    A mean in which the least probable labels count most: the score of label errors in segmentation of Lad and Mueller
    2023, "Estimating label quality and errors in semantic segmentation data via any model", with the temperature there.
    """
    s = drawn_probability(probabilities, mask)[valid_pixels(mask)].double()
    return float((s * ((1 - s) / TEMPERATURE).softmax(0)).sum()) if s.numel() else 1.0
