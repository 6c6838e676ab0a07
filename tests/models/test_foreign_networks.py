"""Networks of other libraries, where these are installed: exact weights by forward mode, equal to a double backward."""

import pytest
import torch
from torch import nn

from distseg import PixelReweighter


def monai_unet() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", exc_type=ImportError)
    return nets.UNet(spatial_dims=2, in_channels=3, out_channels=1, channels=(4, 8), strides=(2,), norm="batch")


def smp_unet() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    return smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 4))


@pytest.mark.parametrize("build", [monai_unet, smp_unet])
def test_forward_is_reverse(build) -> None:
    torch.manual_seed(0)
    model = build().double()
    images = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    masks = torch.randint(0, 2, (2, 2, 32, 32), dtype=torch.uint8)
    batches = images[0], masks[0], images[1], masks[1]
    forward, reverse = (PixelReweighter(model, estimator=each)(*batches) for each in ("forward", "reverse"))
    assert forward.sum() == pytest.approx(1)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-14)
