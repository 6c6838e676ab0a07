"""The estimator `head`: the last layer's part of U, held to a double backward in which all else is frozen."""

import pytest
import torch
from oracle import IGNORE, double_backward, normalised, pixelwise_alignment
from torch import Tensor, nn

from distseg import PixelReweighter
from distseg.errors import InvalidArgument
from distseg.meta.check import check_estimator
from distseg.models.unet import UNet


def batch(count: int, side: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, max(classes, 2), (count, side, side), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORE
    return images, masks.to(torch.uint8)


def frozen_but_for_the_head(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.max().item())


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_is_the_papers_double_backward_by_the_last_layer_alone(norm: str, classes: int) -> None:
    torch.manual_seed(0)
    model = UNet(4, 2, norm=norm, out_channels=classes).double()
    noisy, clean = batch(3, 16, classes, 1), batch(2, 8, classes, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reweighter = PixelReweighter(model, estimator="head")
    actual = reweighter(*noisy, *clean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(actual, PixelReweighter(model)(*noisy, *clean), rtol=1e-2)
    frozen = frozen_but_for_the_head(model)
    exact = PixelReweighter(frozen)
    assert_same(actual, normalised(double_backward(frozen, noisy, clean)))
    assert_same(actual, exact(*noisy, *clean))
    assert_same(reweighter.diagnostics["gradient_norm"], exact.diagnostics["gradient_norm"])


@pytest.mark.parametrize("trained", ["weight and bias", "weight"])
def test_is_exact_where_the_last_layer_is_all(trained: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1).double()
    noisy, clean = batch(3, 8, 4, 1), batch(2, 8, 4, 2)
    if trained == "weight":
        model.bias.requires_grad_(False)
        expected = normalised(double_backward(model, noisy, clean))
    else:
        alignment, _ = pixelwise_alignment(model, noisy, clean)
        expected = normalised(torch.from_numpy(alignment))
    assert_same(PixelReweighter(model, estimator="head")(*noisy, *clean), expected)


@pytest.mark.parametrize("granularity", ["pixel", "patch(4)", "image"])
def test_micro_batches_are_one_large_batch(granularity: str) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1).double()
    (images, masks), (clean_images, clean_masks) = batch(4, 8, 1, 1), batch(4, 8, 1, 2)
    reweighter = PixelReweighter(
        model, estimator="head", granularity=granularity, class_weights=torch.tensor([1.0, 3.0]).double()
    )
    expected = reweighter(images, masks, clean_images, clean_masks)
    halves = (slice(0, 1), slice(1, 4))
    maps = reweighter.weigh(
        [(images[h], masks[h]) for h in halves], [(clean_images[h], clean_masks[h]) for h in halves]
    )
    assert_same(torch.cat([m.full(masks[h]) for m, h in zip(maps, halves, strict=True)]), expected)


class Enlarged(nn.Module):
    """Ends in an interpolation, as networks do whose last layer works at a lower resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.interpolate(self.layers(images), scale_factor=2)


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(3, 1, 3, padding=1),
        Enlarged(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1).requires_grad_(False)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4)),
    ],
    ids=["3×3", "enlarged", "frozen", "grouped"],
)
def test_another_last_layer_is_refused_in_one_line(model: nn.Module) -> None:
    noisy = batch(1, 8, 1, 1)
    for call in (
        lambda: check_estimator("head", model.double(), noisy[0]),
        lambda: PixelReweighter(model.double(), estimator="head")(*noisy, *noisy),
    ):
        with pytest.raises(InvalidArgument, match=r"not that of a trained 1×1 .*; use estimator=forward") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_fast_weights_are_none_of_its() -> None:
    with pytest.raises(ValueError, match="leave initial_weight at 0"):
        PixelReweighter(UNet(4, 1), estimator="head", initial_weight=0.5)
