"""Labelled areas beside those that a network expects: a check of labels that needs no truth of the noisy images.

A are the pixels of an image that are labelled as an object, Â = Σ P(object | x) those that the calibrated network
expects, and β the power by which one grows with the other: the slope of log A over log Â. Noisy and clean images are of
one population, and a network that has learned from no clean image treats both alike. So right labels of the noisy
images have the β of the clean images' references, whatever errors the network makes. Annotators who miss as many pixels
of a small object as of a large one draw masks of another β, and labels that are corrected as if they missed in
proportion to its size keep it. docs/ablation.md has figures.
"""

import torch
from torch import Tensor

from distseg.labels.calibration import calibrated
from distseg.ops import valid_pixels

LEAST_SPREAD = 1e-9
"""The variance of log Â that is more than rounding."""


def area_sums(relative: Tensor, theta: Tensor, labels: Tensor) -> Tensor:
    """(6,) float64: images n that show an object, Σ x, Σ y, Σ x², Σ x·y and Σ y² of them, x = log Â and y = log A.

    Relative logits (B, C, H, W), their calibration θ (C,), labels (B, H, W).
    """
    valid = valid_pixels(labels)
    expected = torch.where(valid, 1 - calibrated(relative, theta).softmax(1)[:, 0], 0.0).sum(
        (1, 2), dtype=torch.float64
    )
    area = (valid & (labels > 0)).sum((1, 2))
    shown = area > 0
    x, y = (torch.where(shown, each.clamp(min=1).log(), 0.0) for each in (expected, area.double()))
    return torch.stack([shown.double().sum(), x.sum(), y.sum(), (x * x).sum(), (x * y).sum(), (y * y).sum()])


def slope(sums: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """β by least squares and its standard error, 0-dim float64, of averaged `area_sums` of so many different images.

    Where all images are alike in size both are NaN: no comparison with them holds.
    """
    x, y, xx, xy, yy = (sums[1:] / sums[0]).unbind()
    spread = torch.where(xx - x * x > LEAST_SPREAD, xx - x * x, torch.nan)
    power = (xy - x * y) / spread
    rest = (yy - y * y - power * (xy - x * y)).clamp(min=0)
    return power, (rest / spread / max(images - 2, 1)).sqrt()
