"""The operators in eager torch: the oracle, the fallback and the baseline of every faster backend.

Shapes: B images, C logit channels, H×W pixels. C = 1 is binary (class ids 0 and 1); C ≥ 2 is a softmax over class ids
0 … C − 1. Class id 255 marks a pixel that nobody vouches for: its loss, weight and alignment are 0, whatever its logit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def valid_pixels(masks_BHW: Tensor) -> Tensor:
    """(B, H, W) bool: where the label counts."""
    return masks_BHW != IGNORE


def pixel_loss(logits_BCHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """Cross-entropy of each pixel, (B, H, W) in the dtype of the logits; 0 at ignored pixels.

    C = 1: −y log σ(z) − (1 − y) log(1 − σ(z)).   C ≥ 2: −log softmax(z)_y.
    """
    logits, masks, valid = _without_ignored(logits_BCHW, masks_BHW)
    if logits.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], masks.to(logits.dtype), reduction="none")
    else:
        loss = F.cross_entropy(logits, masks.long(), reduction="none")
    return torch.where(valid, loss, 0.0)


def weighted_loss(logits_BCHW: Tensor, masks_BHW: Tensor, weights_BHW: Tensor) -> Tensor:
    """Σ W·ℓ over every pixel, a scalar; differentiable, twice, in the logits and in the weights."""
    return (weights_BHW * pixel_loss(logits_BCHW, masks_BHW)).sum()


def alignment(logits_BCHW: Tensor, tangents_BCHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """Σ_c ∂ℓ/∂z_c · ż_c of each pixel, (B, H, W): how fast its loss grows along the tangent of the logits.

    C = 1: (σ(z) − y) ż.   C ≥ 2: Σ_c (softmax(z)_c − [c = y]) ż_c.   0 at ignored pixels.
    """
    logits, masks, valid = _without_ignored(logits_BCHW, masks_BHW)
    tangents = torch.where(valid[:, None], tangents_BCHW, 0.0)
    if logits.shape[1] == 1:
        return ((torch.sigmoid(logits) - masks[:, None].to(logits.dtype)) * tangents)[:, 0]
    chosen = tangents.gather(1, masks.long()[:, None])[:, 0]
    return (torch.softmax(logits, dim=1) * tangents).sum(dim=1) - chosen


def _without_ignored(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Ignored pixels get logit 0 and class 0 before anything is computed, so that a NaN there reaches neither the value
    # nor, by 0 · NaN, the gradient.
    valid = valid_pixels(masks)
    return torch.where(valid[:, None], logits, 0.0), torch.where(valid, masks, 0), valid
