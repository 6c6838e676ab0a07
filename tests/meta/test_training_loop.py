"""The example of the README in a plain loop: half of the noisy labels are wrong and the network learns all the same."""

import pytest
import torch
from torch import Tensor, nn

from distseg import PixelReweighter, weighted_loss
from distseg.models.unet import UNet

SIZE, STEPS, NOISY, CLEAN = 16, 60, 8, 4


def lesions(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Dark discs at random places on noisy skin: images (B, 3, 16, 16), true masks (B, 16, 16)."""
    centres = 4 + 8 * torch.rand(count, 2, 1, 1, generator=generator)
    radii = 2 + 3 * torch.rand(count, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    masks = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 <= radii**2
    images = 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=generator) - masks[:, None].float()
    return images, masks.to(torch.uint8)


def half_flipped(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Exactly half of each image's labels are wrong: by themselves they say nothing about the truth."""
    order = torch.rand(masks.shape, generator=generator).flatten(1).argsort(dim=1)
    wrong = (order < order.shape[1] // 2).view_as(masks)
    return torch.where(wrong, 1 - masks, masks)


def dice(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    with torch.no_grad():
        predicted = model(images)[:, 0] > 0
    return (2 * (predicted & (masks == 1)).sum() / (predicted.sum() + masks.sum())).item()


def train(seed: int, reweigh: bool) -> float:
    """Dice on held-out images."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = UNet(4, 1, norm="group")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    reweighter = PixelReweighter(model, estimator="forward", granularity="pixel")
    clean_images, clean_masks = lesions(CLEAN, generator)
    for _ in range(STEPS):
        images, truth = lesions(NOISY, generator)
        masks = half_flipped(truth, generator)
        if reweigh:
            weights = reweighter(images, masks, clean_images, clean_masks)
        else:
            weights = torch.full(masks.shape, 1 / masks.numel())
        loss = weighted_loss(model(images), masks, weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return dice(model, *lesions(64, generator))


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_rescue_the_network_from_its_labels(seed: int) -> None:
    weighted, uniform = train(seed, reweigh=True), train(seed, reweigh=False)
    assert weighted > 0.75
    assert weighted > uniform + 0.2
