"""Invariant 8 (DESIGN §2): diagnosis changes nothing. The weights are the same bits with and without known truth."""

import itertools

import pytest
import torch
from torch import nn

from distseg import PixelReweighter


def batch(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, max(classes, 2), (count, 37, 41), generator=generator, dtype=torch.uint8)
    masks[0, :5] = 255
    return torch.randn(count, 3, 37, 41, generator=generator), masks


@pytest.mark.parametrize("classes", [1, 2, 3, 8])
@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite"])
def test_weights_are_the_same_bits_whether_or_not_the_truth_is_known(estimator: str, classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, classes, 1))
    noisy, clean, (_, truth) = batch(3, classes, 1), batch(2, classes, 2), batch(3, classes, 3)
    rules = itertools.product(("pixel", "patch(4)", "image"), ("batch", "image"), ("clamp", "root", "sign"))
    for granularity, normalise, transform in rules:
        reweighter = PixelReweighter(
            model, estimator=estimator, granularity=granularity, normalise=normalise, transform=transform
        )
        unseen = reweighter(*noisy, *clean)
        common = dict(reweighter.diagnostics)
        assert torch.equal(reweighter(*noisy, *clean, truth), unseen), (granularity, normalise, transform)
        assert all(torch.equal(reweighter.diagnostics[name], value) for name, value in common.items())
        assert "auroc" in reweighter.diagnostics and "auroc" not in common


def test_one_way_to_sum_is_given() -> None:
    from distseg.meta.reduction import OneProcess

    with pytest.raises(ValueError, match="give one of them"):
        PixelReweighter(nn.Conv2d(3, 1, 1), sum_over_ranks=lambda tensor: tensor, reduction=OneProcess())
