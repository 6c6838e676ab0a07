"""A network without kinks: what one processor rounds otherwise than another stays as small as it is."""

from torch import Tensor, nn


class SmoothNetwork(nn.Module):
    def __init__(self, width: int = 8, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GroupNorm(2, width),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Tanh(),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(width, outputs, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
