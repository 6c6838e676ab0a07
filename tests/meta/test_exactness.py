"""Invariants 1 and 2 (DESIGN §2): the estimators are exact, on networks as users have them, and α does not matter."""

import copy

import pytest
import torch
from oracle import IGNORE, double_backward, normalised
from torch import Tensor, nn

from distseg import PixelReweighter
from distseg.models.unet import UNet

EXACT = ["forward", "reverse"]


def batch(count: int, height: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, max(classes, 2), (count, height, width), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORE
    return images, masks.to(torch.uint8)


def noisy_and_clean(classes: int = 1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Batches of unequal count and size."""
    return batch(3, 16, 8, classes, seed=1), batch(2, 8, 12, classes, seed=2)


def assert_same_weights(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    # Relative to the largest weight: U is a sum of terms of both signs, so a weight near 0 has lost digits to
    # cancellation.
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.max().item())


def smooth_network() -> nn.Module:
    """Every operator is infinitely differentiable, so the error of `finite` is its Taylor remainder."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 3, padding=1)).double()


class DropoutNetwork(nn.Module):
    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Dropout2d(0.3))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("estimator", EXACT)
def test_unet_matches_the_papers_double_backward(estimator: str, norm: str, classes: int) -> None:
    torch.manual_seed(0)
    model = UNet(4, 2, norm=norm, out_channels=classes).double()
    noisy, clean = noisy_and_clean(classes)
    expected = normalised(double_backward(model, noisy, clean, alpha=0.37))
    actual = PixelReweighter(model, estimator=estimator)(*noisy, *clean)
    assert (expected > 0).any()
    assert (expected[noisy[1] != IGNORE] == 0).any()
    assert_same_weights(actual, expected)


@pytest.mark.parametrize("estimator", EXACT)
def test_batchnorm_in_eval_mode_uses_its_running_statistics(estimator: str) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1, norm="batch").double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    noisy, clean = noisy_and_clean()
    in_training_mode = PixelReweighter(model, estimator=estimator)(*noisy, *clean)
    model.eval()
    actual = PixelReweighter(model, estimator=estimator)(*noisy, *clean)
    assert_same_weights(actual, normalised(double_backward(model, noisy, clean)))
    assert not torch.allclose(actual, in_training_mode, rtol=1e-3)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_finite_agrees_on_a_unet(norm: str) -> None:
    torch.manual_seed(0)
    model = UNet(4, 2, norm=norm).double()
    noisy, clean = noisy_and_clean()
    expected = normalised(double_backward(model, noisy, clean))
    actual = PixelReweighter(model, estimator="finite", finite_step=1e-7)(*noisy, *clean)
    assert_same_weights(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-2), (torch.float64, 1e-3)])
def test_the_default_step_of_finite_suits_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    model = smooth_network()
    noisy, clean = noisy_and_clean()
    expected = normalised(double_backward(model, noisy, clean))
    model = model.to(dtype)
    (images, masks), (clean_images, clean_masks) = noisy, clean
    reweighter = PixelReweighter(model, estimator="finite")
    actual = reweighter(images.to(dtype), masks, clean_images.to(dtype), clean_masks)
    assert_same_weights(actual.double(), expected, rtol=tolerance)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_the_default_step_of_finite_suits_units_that_switch(norm: str) -> None:
    torch.manual_seed(0)
    model = UNet(8, 3, norm=norm)
    noisy, clean = batch(3, 32, 32, 1, seed=1), batch(2, 32, 32, 1, seed=2)
    double = copy.deepcopy(model).double()
    expected = normalised(double_backward(double, noisy, clean))
    (images, masks), (clean_images, clean_masks) = noisy, clean
    reweighter = PixelReweighter(model, estimator="finite")
    actual = reweighter(images.float(), masks, clean_images.float(), clean_masks).double()
    assert (actual / actual.sum() - expected / expected.sum()).abs().sum() < 0.02


def test_halving_the_finite_step_quarters_the_error() -> None:
    model = smooth_network()
    noisy, clean = noisy_and_clean()
    exact = PixelReweighter(model, estimator="forward")(*noisy, *clean)
    errors = [
        (PixelReweighter(model, estimator="finite", finite_step=step)(*noisy, *clean) - exact).norm().item()
        for step in (0.04, 0.02, 0.01)
    ]
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert ratios == pytest.approx([4, 4], rel=0.05)


@pytest.mark.parametrize("virtual_lr", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("estimator", EXACT)
def test_virtual_lr_does_not_matter(estimator: str, virtual_lr: float) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1, norm="group").double()
    noisy, clean = noisy_and_clean()
    expected = normalised(double_backward(model, noisy, clean, alpha=0.01))
    actual = PixelReweighter(model, estimator=estimator, virtual_lr=virtual_lr)(*noisy, *clean)
    assert_same_weights(actual, expected)


@pytest.mark.parametrize("estimator", [*EXACT, "finite"])
@pytest.mark.parametrize(("virtual_lr", "initial_weight"), [(0.05, 1.0), (0.2, 3.0)])
def test_a_virtual_step_that_starts_elsewhere(estimator: str, virtual_lr: float, initial_weight: float) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1, norm="group").double()
    noisy, clean = noisy_and_clean()
    expected = normalised(double_backward(model, noisy, clean, virtual_lr, initial_weight=initial_weight))
    start = {"virtual_lr": virtual_lr, "initial_weight": initial_weight}
    reweighter = PixelReweighter(model, estimator=estimator, finite_step=1e-7, **start)
    assert_same_weights(reweighter(*noisy, *clean), expected, rtol=1e-10 if estimator in EXACT else 1e-5)
    from_zero = PixelReweighter(model, estimator=estimator, virtual_lr=virtual_lr)(*noisy, *clean)
    assert (from_zero - expected).abs().max() > 0.02 * expected.max()


@pytest.mark.parametrize("options", [{"virtual_lr": 0.0}, {"initial_weight": -1.0}])
def test_a_virtual_step_that_is_none_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        PixelReweighter(smooth_network(), **options)


@pytest.mark.parametrize("estimator", [*EXACT, "finite"])
@pytest.mark.parametrize("classes", [1, 4])
def test_dropout_draws_the_same_units_in_every_estimator(estimator: str, classes: int) -> None:
    torch.manual_seed(0)
    model = DropoutNetwork(classes).double()
    noisy, clean = noisy_and_clean(classes)
    expected = normalised(double_backward(model, noisy, clean, seed=7))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    actual = PixelReweighter(model, estimator=estimator)(*noisy, *clean)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(actual, expected, rtol=1e-10 if estimator in EXACT else 1e-3)
    other_draw = normalised(double_backward(model, noisy, clean, seed=8))
    assert not torch.allclose(actual, other_draw, rtol=1e-2)


@pytest.mark.parametrize("estimator", EXACT)
def test_dropout_weights_are_for_the_step_that_follows(estimator: str) -> None:
    """The weighted step's forward pass, run next, drops the units that the weights were computed for."""
    torch.manual_seed(0)
    model = DropoutNetwork().double()
    (images, masks), clean = noisy_and_clean()
    torch.manual_seed(7)
    weights = PixelReweighter(model, estimator=estimator)(images, masks, *clean)
    drops = []
    model.head[0].register_forward_hook(lambda module, inputs, output: drops.append(output.detach() == 0))
    model(images)
    torch.manual_seed(7)
    PixelReweighter(model, estimator=estimator)(images, masks, *clean)
    noisy_passes = [drop for drop in drops[1:] if drop.shape == drops[0].shape]
    assert noisy_passes
    assert all(torch.equal(drop, drops[0]) for drop in noisy_passes)
    assert weights.sum().item() == pytest.approx(1)


class Awkward(nn.Module):
    """Tied, frozen and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.frozen = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
        self.head = nn.Conv2d(5, 1, 1)
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(torch.tanh(self.first(images)))
        return self.head(torch.tanh(self.frozen(features)))


@pytest.mark.parametrize("estimator", EXACT)
def test_tied_frozen_and_unused_parameters(estimator: str) -> None:
    torch.manual_seed(0)
    model = Awkward().double()
    noisy, clean = noisy_and_clean()
    expected = normalised(double_backward(model, noisy, clean))
    assert_same_weights(PixelReweighter(model, estimator=estimator)(*noisy, *clean), expected)
    thawed = Awkward().double()
    thawed.load_state_dict(model.state_dict())
    thawed.requires_grad_(True)
    assert not torch.allclose(PixelReweighter(thawed, estimator=estimator)(*noisy, *clean), expected, rtol=1e-3)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("estimator", EXACT)
def test_channels_last_parameters_and_images(estimator: str, norm: str) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1, norm=norm).double()
    (images, masks), (clean_images, clean_masks) = noisy_and_clean()
    expected = normalised(double_backward(model, (images, masks), (clean_images, clean_masks)))
    model = model.to(memory_format=torch.channels_last)
    images, clean_images = (x.to(memory_format=torch.channels_last) for x in (images, clean_images))
    assert_same_weights(PixelReweighter(model, estimator=estimator)(images, masks, clean_images, clean_masks), expected)


@pytest.mark.parametrize("estimator", [*EXACT, "finite"])
def test_a_rotated_view_is_an_input_like_any_other(estimator: str) -> None:
    """GroupNorm's forward-mode formula needs contiguous input, and a rotated augmentation is not."""
    torch.manual_seed(0)
    model = UNet(4, 1, norm="group").double()
    (images, masks), clean = noisy_and_clean()
    rotated = torch.rot90(images, 1, (2, 3)), torch.rot90(masks, 1, (1, 2))
    expected = normalised(double_backward(model, (rotated[0].contiguous(), rotated[1].contiguous()), clean))
    actual = PixelReweighter(model, estimator=estimator)(*rotated, *clean)
    assert_same_weights(actual, expected, rtol=1e-10 if estimator in EXACT else 1e-3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_of_any_integer_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1, out_channels=4).double()
    (images, masks), (clean_images, clean_masks) = noisy_and_clean(4)
    expected = normalised(double_backward(model, (images, masks), (clean_images, clean_masks)))
    actual = PixelReweighter(model)(images, masks.to(dtype), clean_images, clean_masks.to(dtype))
    assert_same_weights(actual, expected)
