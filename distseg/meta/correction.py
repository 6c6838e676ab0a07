"""The label that a pixel most probably has, from what the network expects there and from what was drawn.

    P(c | x, y) ∝ p_c(x) · T_cy,      T_cy = P(drawn y | true c)

p is the network's softmax. T, one small matrix for all pixels, is counted from the noisy stream, with what the network
expects in place of the truth (Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
Algorithm"; with a network for the prior, Bekker and Goldberger 2016, "Training Deep Neural-Networks Based on Unreliable
Labels"). Under masks that miss much of a lesion, T says that a drawn lesion is one and that drawn background says
little: there the network decides.

Logits (B, C, H, W), C = 1 binary; masks (B, H, W) class ids, 255 = ignore; counts (C, C) float64, of at least two
classes: rows the expected label, columns the drawn one.
"""

import torch
from torch import Tensor

from distseg.ops import IGNORE, valid_pixels


def expected_counts(logits: Tensor, masks: Tensor) -> Tensor:
    """How many of the valid pixels that were drawn as d the network expects to be c: Σ p_c [y = d]."""
    probabilities, valid = _probabilities(logits, masks), valid_pixels(masks)
    drawn = torch.arange(probabilities.shape[1], device=masks.device)[:, None, None, None] == masks
    return torch.einsum("bchw,dbhw->cd", probabilities, (drawn & valid).to(probabilities.dtype)).double()


def corrected(logits: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """masks with the most probable label at each valid pixel, by `expected_counts` of many pixels."""
    valid = valid_pixels(masks)
    transition = counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    likelihood = transition.to(logits.dtype)[:, torch.where(valid, masks, 0).long()].movedim(0, 1)
    most_probable = (_probabilities(logits, masks) * likelihood).argmax(1)
    return torch.where(valid, most_probable.to(masks.dtype), IGNORE)


def _probabilities(logits: Tensor, masks: Tensor) -> Tensor:
    """(B, C, H, W) of two or more classes; of logits 0 at ignored pixels, where a network may say anything."""
    logits = torch.where(valid_pixels(masks)[:, None], logits, 0.0)
    if logits.shape[1] == 1:
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], dim=1)
    return logits.softmax(1)
