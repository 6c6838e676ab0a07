"""Weights in a training loop of your own: no config, no DeepSpeed, no tracker.

    python examples/own_loop.py

Two networks learn from 64 triangles drawn inside the lesions. The second one also has 16 expert masks, and weighs each
pixel of the triangles by whether learning from it helps on them. Prints both networks' Dice on 50 further images.
"""

import torch
from drawn import lesions
from torch import Tensor, nn

from distseg import PixelReweighter, weighted_loss
from distseg.models.unet import UNet

STEPS, BATCH = 60, 8


def train(weigh: bool) -> nn.Module:
    torch.manual_seed(0)
    images, _, triangles = lesions(64, seed=1)
    clean_images, clean_masks, _ = lesions(16, seed=2)
    model = UNet(width=8, depth=2, norm="group")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    reweighter = PixelReweighter(model)
    for _ in range(STEPS):
        noisy, clean = torch.randperm(len(images))[:BATCH], torch.randperm(len(clean_images))[:BATCH]
        x, y = images[noisy], triangles[noisy]
        weights = torch.full(y.shape, 1 / y.numel())
        if weigh:
            weights = reweighter(x, y, clean_images[clean], clean_masks[clean])
        loss = weighted_loss(model(x), y, weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def dice(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean over images (B, 3, H, W) and masks (B, H, W) at threshold 0.5."""
    with torch.no_grad():
        predicted = model(images)[:, 0] > 0
    true = masks.bool()
    both = (predicted & true).sum(dim=(1, 2))
    return (2 * both / (predicted.sum(dim=(1, 2)) + true.sum(dim=(1, 2)))).mean().item()


def main() -> None:
    images, masks, _ = lesions(50, seed=3)
    for name, weigh in (("uniform", False), ("weighted", True)):
        print(f"{name:9} Dice {dice(train(weigh), images, masks):.3f}")


if __name__ == "__main__":
    main()
