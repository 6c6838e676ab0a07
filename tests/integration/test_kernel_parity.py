"""Weighted training with the fast operators and with eager ones is the same training."""

import pytest
import torch
from torch import nn

from distseg import PixelReweighter, ops, weighted_loss

STEPS = 50


def losses(backend: str, granularity: str, classes: int) -> list[float]:
    """Of a small network that learns, by weighted steps, to tell bright from dark under masks with a wrong quarter.

    It is smooth and learns slowly: where one rounding decides a ReLU, or a step overshoots, two eager runs part ways.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU()),
        nn.Conv2d(8, classes, 1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reweighter = PixelReweighter(model, granularity=granularity)
    generator = torch.Generator().manual_seed(1)
    values = []
    with ops.using(backend):
        for _ in range(STEPS):
            images = torch.rand(4, 3, 16, 16, generator=generator)
            truth = (images[:, 0] > 0.5).to(torch.uint8)
            wrong = torch.rand(2, 16, 16, generator=generator) < 0.25
            masks = torch.where(wrong, 1 - truth[:2], truth[:2])
            masks[0, :2] = ops.IGNORE
            weights = reweighter(images[:2], masks, images[2:], truth[2:])
            loss = weighted_loss(model(images[:2]), masks, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    return values


@pytest.mark.parametrize(("granularity", "classes"), [("pixel", 1), ("patch(4)", 1), ("image", 1), ("pixel", 3)])
def test_kernels_on_and_off_give_the_same_losses(granularity: str, classes: int) -> None:
    fast, eager = losses("csrc", granularity, classes), losses("reference", granularity, classes)
    assert fast == pytest.approx(eager, rel=1e-5)
    assert fast != eager, "the two backends round differently, so equal bits mean that one of them was not used"
    assert fast[-1] < fast[0]
