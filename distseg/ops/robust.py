"""Losses that bear wrong labels without knowing which: the rivals of weights. Differentiable, pure functions.

Logits (B, C, H, W), masks (B, H, W) class ids, 255 = ignore, as in distseg.ops; ignored pixels contribute 0.
"""

import math

import torch
from torch import Tensor

from distseg.ops import known_labels, pixel_loss, valid_pixels
from distseg.ops.reference import unknown_labels


def generalised_cross_entropy(logits: Tensor, masks: Tensor, q: float) -> Tensor:
    """(1 − p_y^q) / q of each pixel, (B, H, W): between cross-entropy (q → 0) and the mean absolute error (q = 1).

    p_y is the probability of the pixel's label. The gradient is p_y^q times that of cross-entropy, so that labels which
    the network does not believe count less (Zhang and Sabuncu 2018, equations 6 and 7). 0 < q ≤ 1.
    """
    # p_y = exp(−ℓ): the cross-entropy of the fast operators is all that it takes.
    return -torch.expm1(-q * pixel_loss(logits, masks)) / q


def student_t_loss(logits: Tensor, masks: Tensor, log_nu: Tensor) -> Tensor:
    """T-Loss of each image, (B,): the negative log-likelihood of its errors under a Student-t distribution.

    The error of an image is one vector δ = p − y of D valid pixels (D·C values of softmax and one-hot labels for C ≥ 2
    channels), with identity scale matrix and ν = exp(log_nu) degrees of freedom (Gonzalez-Jimenez et al. 2023, equation
    4):

        −log Γ((ν + D) / 2) + log Γ(ν / 2) + D/2 · log(πν) + (ν + D) / 2 · log(1 + ‖δ‖² / ν)

    log_nu: a scalar, learned with the network: small ν bears much noise, and ν → ∞ is the squared error. In float64 its
    gradient is that of the errors to double precision, whatever the logits' dtype.
    """
    masks = known_labels(logits, masks)
    valid = valid_pixels(masks)
    # Before anything is computed, so that a NaN at an ignored pixel reaches neither the value nor the gradient.
    logits = torch.where(valid[:, None], logits, 0.0)
    logits = torch.where(unknown_labels(masks, logits.shape[1])[:, None], torch.nan, 0.0) + logits
    if logits.shape[1] == 1:
        error = (logits[:, 0].sigmoid() - (masks == 1).to(logits.dtype)).square()
    else:
        classes = torch.arange(logits.shape[1], device=masks.device)[:, None, None]
        error = (logits.softmax(1) - (masks[:, None] == classes).to(logits.dtype)).square().sum(1)
    # From here on in double precision, a few numbers an image: they are small differences of large ones.
    squares = torch.where(valid, error, 0.0).sum((1, 2), dtype=torch.float64)
    dimension = valid.sum((1, 2)).double() * logits.shape[1]
    nu = log_nu.double().exp()
    loss = (
        torch.lgamma(nu / 2)
        - torch.lgamma((nu + dimension) / 2)
        + dimension / 2 * (math.log(math.pi) + log_nu)
        + (nu + dimension) / 2 * torch.log1p(squares / nu)
    )
    return loss.to(logits.dtype)
