"""The paper's U-Net (Ronneberger et al. 2015, with padded convolutions), and its narrower and normalised relatives."""

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """(B, in_channels, H, W) float → logits (B, out_channels, H, W); H and W multiples of 2**depth.

    `width` is the number of channels at full resolution and doubles at each of `depth` downsamplings. Width 64, depth 4
    and no normalisation is the paper's network: 31,031,745 parameters. `norm` is none, batch or group.
    """

    def __init__(
        self, width: int = 64, depth: int = 4, norm: str = "none", in_channels: int = 3, out_channels: int = 1
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = _double_convolution(in_channels, width, norm)
        self.down = nn.ModuleList(_double_convolution(w, 2 * w, norm) for w in widths[:-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_double_convolution(2 * w, w, norm) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, out_channels, 1)
        self.pool = nn.MaxPool2d(2)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        skips = []
        for down in self.down:
            skips.append(features)
            features = down(self.pool(features))
        for up, merge in zip(self.up, self.merge, strict=True):
            features = merge(torch.cat([skips.pop(), up(features)], dim=1))
        return self.head(features)


def _double_convolution(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), *_normalisation(norm, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _normalisation(norm: str, channels: int) -> list[nn.Module]:
    if norm == "none":
        return []
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "group":
        groups = next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
        return [nn.GroupNorm(groups, channels)]
    raise ValueError(f"norm {norm!r}: none, batch or group")


def _initialise(module: nn.Module) -> None:
    # Convolutions feed a ReLU: He et al. 2015. Each output pixel of the 2×2, stride-2 transposed ones sums over the
    # input channels alone and feeds no ReLU. Without normalisation the paper's depth does not train from PyTorch's
    # defaults.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        _zero(module.bias)
    elif isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=module.in_channels**-0.5)
        _zero(module.bias)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
