"""A network of your own, for `model.name`: images (B, 3, H, W) → logits (B, 1, H, W). See own_network.yaml."""

import torch
from torch import Tensor, nn


class Dilated(nn.Module):
    """Convolutions of growing dilation at full resolution: no pooling, so any image size fits."""

    def __init__(self, width: int = 8, dilations: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        channels = [3] + [width] * len(dilations)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation)
            for before, after, dilation in zip(channels, channels[1:], dilations, strict=False)
        )
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for layer in self.layers:
            features = torch.relu(layer(features))
        return self.head(features)
