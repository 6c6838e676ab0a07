"""How far a network's probabilities can be believed, measured on clean images that it has not learned from.

    log P(c | x) = a·z_c + b_c − log Σ_k exp(a·z_k + b_k),        b_0 = 0

One scale a for all classes and a shift b_c for each but the first ("Platt scaling", Platt 1999, "Probabilistic Outputs
for Support Vector Machines"; for networks Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural
Networks"), by maximum likelihood. Two classes have two numbers. A network that has learned from the masks of annotators
who miss the rim misses it too, and is sure of it: its b then says by how much.

The likelihood is maximised by Newton steps on sums over pixels that are averaged over training steps. At parameters
θ = (a, b) with gradient g and Hessian H of the negative log-likelihood, its second-order model in φ is
½ φᵀHφ − (Hθ − g)ᵀφ: H and Hθ − g add up over images, ranks and steps, whatever θ each of them was taken at.

Relative logits (B, C, H, W) float, those of class 0 are zero; masks (B, H, W) class ids, 255 = ignore; θ (C,) float64.
"""

import torch
from torch import Tensor

from distseg.ops import valid_pixels

PRIOR = 1e-3
"""Weight of the prior θ = (1, 0), in pixels a pixel: it decides only what the pixels leave open, for instance where
they are separated without error, which no finite scale is enough for."""
LONGEST_STEP = 1.0
"""Of a or a b at once. Far from the maximum, where most pixels are sure and wrong, Newton's step is too long."""


def relative_logits(logits: Tensor) -> Tensor:
    """(B, C, H, W) of logits (B, C, H, W), or of those of one channel (B, 1, H, W), which are of two classes."""
    if logits.shape[1] == 1:
        return torch.cat([torch.zeros_like(logits), logits], 1)
    return logits - logits[:, :1]


def identity(classes: int, device: torch.device) -> Tensor:
    """θ of a network that is believed as it is."""
    theta = torch.zeros(classes, dtype=torch.float64, device=device)
    theta[0] = 1
    return theta


def calibrated(relative: Tensor, theta: Tensor) -> Tensor:
    """a·z + b, (B, C, H, W): logits whose softmax is P(c | x). θ may be one for each image, (B, C)."""
    scale, shift = theta[..., :1].to(relative.dtype), _shift(theta).to(relative.dtype)
    return scale[..., None, None] * relative + shift[..., None, None]


def calibration_sums(relative: Tensor, masks: Tensor, theta: Tensor, *others: Tensor) -> Tensor:
    """(1 + D + D²,) float64, D = len(θ): valid pixels n, Σ (Hθ − g) and Σ H of them at θ.

    others: more scores like `relative`, each with a scale of its own after a in θ = (a, a′, …, b): the logits of P are
    a·z + a′·z′ + … + b.
    """
    valid = valid_pixels(masks)
    # Classes first: sums over them then run along pixels, which takes a fifth of the time.
    scores = [
        torch.where(valid[:, None], score, 0.0).transpose(0, 1).double().flatten(1) for score in (relative, *others)
    ]
    joint = torch.stack([scale * z for scale, z in zip(theta[: len(scores)], scores, strict=True)]).sum(0)
    p = (joint + _shift(theta[len(scores) - 1 :])[:, None]).softmax(0)
    seen = valid.flatten().double()
    number = torch.arange(len(p), device=masks.device)[:, None]
    residual = (p - (masks.flatten() == number).double()) * seen
    # dθ of the logits: z for a, the unit vectors for b. Rows of the Jacobian J: a, a′, …, then b_1 …
    gradient = torch.cat([torch.stack([(residual * z).sum() for z in scores]), residual[1:].sum(1)])
    weighted = p * seen
    with_scales = [weighted * (z - (p * z).sum(0)) for z in scores]  # J H_z of a, H_z = diag(p) − p pᵀ
    of_scales = torch.stack([torch.stack([(with_scale * z).sum() for z in scores]) for with_scale in with_scales])
    mixed = torch.stack([with_scale[1:].sum(1) for with_scale in with_scales])
    of_shift = torch.diag(weighted[1:].sum(1)) - p[1:] @ weighted[1:].T
    hessian = torch.cat([torch.cat([of_scales, mixed], 1), torch.cat([mixed.T, of_shift], 1)])
    return torch.cat([seen.sum()[None], hessian @ theta - gradient, hessian.flatten()])


def newton_step(theta: Tensor, sums: Tensor, shifts: bool = True) -> Tensor:
    """The next θ = (a, b) from averaged `calibration_sums`; θ itself where they are of no pixel. a stays above zero.

    shifts: whether b may differ from 0.
    """
    free = torch.ones_like(theta)
    free[1:] = float(shifts)
    ahead = _toward(theta, sums, free)
    return torch.where(sums[0] > 0, torch.cat([ahead[:1].clamp(min=0), ahead[1:]]), theta)


def joint_newton_step(theta: Tensor, sums: Tensor) -> Tensor:
    """`newton_step` of two scores, θ = (a, a′, b): where a would fall below zero it is zero and the others are best."""
    everything = _toward(theta, sums, torch.ones_like(theta))
    alone = torch.ones_like(theta)
    alone[0] = 0
    ahead = torch.where(everything[0] < 0, _toward(theta, sums, alone), everything)
    return torch.where(sums[0] > 0, torch.cat([ahead[:2].clamp(min=0), ahead[2:]]), theta)


def gain_sums(relative: Tensor, masks: Tensor, theta: Tensor, theta_of_scale: Tensor) -> Tensor:
    """(4,) float64: images n, Σ ℓ₀, Σ d and Σ d² over them.

    ℓ is an image's mean negative log-likelihood at θ, ℓ₀ at a θ that has no shift, and d = ℓ₀ − ℓ.
    """
    loss, before = (_image_losses(calibrated(relative, each), masks) for each in (theta, theta_of_scale))
    gain = before - loss
    seen = valid_pixels(masks).any(2).any(1).double()
    return torch.stack([seen.sum(), before.sum(), gain.sum(), gain.square().sum()])


def dice_gain_sums(labels: Tensor, before: Tensor, masks: Tensor, classes: int) -> Tensor:
    """(3,) float64: images n whose masks (B, H, W) show an object, Σ d and Σ d² over them.

    d is how much nearer `labels` are to an image's mask than the labels `before`, both (B, H, W), in Dice, a mean over
    the classes that the mask shows.
    """
    before, after = (_image_dice(each, masks, classes) for each in (before, labels))
    shown = before.isfinite()
    gain = torch.where(shown, after - before, 0.0)
    return torch.stack([shown.double().sum(), gain.sum(), gain.square().sum()])


def mean_gain(sums: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The mean of d and its standard error, 0-dim float64, of averaged `dice_gain_sums` of so many different images."""
    count = sums[0].clamp(min=torch.finfo(sums.dtype).tiny)
    gain, square = sums[1] / count, sums[2] / count
    return gain, ((square - gain.square()).clamp(min=0) / max(images - 1, 1)).sqrt()


def relative_gain(sums: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The share of the loss on clean images that the shift takes away, and its standard error, 0-dim float64.

    sums: averaged `gain_sums`; images: how many different ones they are of.
    """
    count = sums[0].clamp(min=torch.finfo(sums.dtype).tiny)
    loss, gain, square = sums[1] / count, sums[2] / count, sums[3] / count
    error = ((square - gain.square()).clamp(min=0) / max(images - 1, 1)).sqrt()
    known = loss > 0
    return torch.where(known, gain / loss, 0.0), torch.where(known, error / loss, 0.0)


def _image_dice(labels: Tensor, masks: Tensor, classes: int) -> Tensor:
    """(B,) float64: Dice of labels (B, H, W), a mean over the classes that a mask shows; NaN where it shows none."""
    valid, foreground = valid_pixels(masks), torch.arange(1, classes, device=masks.device).view(-1, 1, 1, 1)
    drawn, found = ((each == foreground) & valid for each in (masks, labels))
    common, both = (each.sum((2, 3)).double() for each in (drawn & found, drawn.int() + found.int()))
    return torch.where(drawn.any(3).any(2), 2 * common / both, torch.nan).nanmean(0)


def _image_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """(B,) float64, 0 for an image without a valid pixel."""
    valid = valid_pixels(masks)
    log_p = torch.where(valid[:, None], logits, 0.0).log_softmax(1)
    of_label = log_p.gather(1, torch.where(valid, masks, 0).long()[:, None])[:, 0]
    sums = torch.where(valid, -of_label, 0.0).sum((1, 2), dtype=torch.float64)
    return sums / valid.sum((1, 2)).clamp(min=1)


def _toward(theta: Tensor, sums: Tensor, free: Tensor) -> Tensor:
    """At most a step from θ toward the maximum in what is free (1, not 0); what is not goes toward 0."""
    size = len(theta)
    count, linear, hessian = sums[0], sums[1 : 1 + size], sums[1 + size :].view(size, size)
    weight = PRIOR * torch.where(count > 0, count, 1.0)
    # What is not free has a row and a column of the unit matrix.
    matrix = (hessian + weight * torch.eye(size, dtype=theta.dtype, device=theta.device)) * free * free[:, None]
    matrix = matrix + torch.diag(1 - free)
    best = torch.linalg.solve_ex(matrix, (linear + weight * identity(size, theta.device)) * free)[0]
    return theta + (best - theta).clamp(-LONGEST_STEP, LONGEST_STEP)


def _shift(theta: Tensor) -> Tensor:
    """(…, C): b, with b_0 = 0."""
    return torch.cat([torch.zeros_like(theta[..., :1]), theta[..., 1:]], -1)
