"""The slope of labelled areas over expected ones, against a library's regression."""

import math

import pytest
import torch
from scipy.stats import linregress

from distseg.labels.areas import area_sums, slope


def test_slope_and_error_are_those_of_a_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.randn(12, 1, 9, 11, dtype=torch.float64, generator=generator)
        + torch.linspace(-2, 1, 12)[:, None, None, None]
    )
    relative = torch.cat([torch.zeros_like(logits), logits], 1)
    labels = (logits[:, 0] + 0.3 * torch.randn(12, 9, 11, dtype=torch.float64, generator=generator) > 0.5).byte()
    labels[:, 0] = 255
    labels[3, 1:] = 0  # shows no object
    theta = torch.tensor([1.5, 0.25], dtype=torch.float64)
    shown = [image for image in range(12) if (labels[image, 1:] == 1).any()]
    assert 6 < len(shown) < 12
    x = [(1.5 * logits[image, 0, 1:] + 0.25).sigmoid().sum().log().item() for image in shown]
    y = [math.log((labels[image] == 1).sum().item()) for image in shown]
    sums = area_sums(relative, theta, labels)
    assert sums[0] == len(shown)
    expected = linregress(x, y)
    found, error = slope(sums / 7, len(shown))
    assert found.item() == pytest.approx(expected.slope) and error.item() == pytest.approx(expected.stderr)
    halves = area_sums(relative[:5], theta, labels[:5]) + area_sums(relative[5:], theta, labels[5:])
    torch.testing.assert_close(halves, sums)


def test_images_of_one_size_or_none_have_no_slope() -> None:
    theta = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for value in (0.0, 0.1, 0.7):  # rounding leaves some variance, or a negative one
        relative = torch.stack([torch.zeros(7, 5, 5), torch.full((7, 5, 5), value)], 1)
        for shown in (0, 1):
            labels = torch.zeros(7, 5, 5, dtype=torch.uint8)
            labels[:, : 1 + shown] = shown
            labels[0, 4] = shown
            assert all(each.isnan() for each in slope(area_sums(relative, theta, labels), 7))
