"""Weighted training with the fast operators and with eager ones is the same training."""

import pytest
import torch

from distseg import PixelReweighter, ops, weighted_loss
from distseg.models import UNet

STEPS = 50


def losses(backend: str, granularity: str, classes: int) -> list[float]:
    """Of a small U-Net that learns, by weighted steps, to tell bright from dark under masks with a wrong quarter."""
    torch.manual_seed(0)
    model = UNet(width=4, depth=2, norm="group", out_channels=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
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
