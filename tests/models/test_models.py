import pytest
import torch

from distseg.errors import UserError
from distseg.models.config import ModelConfig
from distseg.models.registry import build_model
from distseg.models.unet import UNet


def test_the_papers_network_has_its_number_of_parameters() -> None:
    assert sum(p.numel() for p in UNet(width=64, depth=4, norm="none").parameters()) == 31_031_745


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("depth", [1, 3])
def test_logits_are_at_the_resolution_of_the_images(norm: str, depth: int) -> None:
    logits = UNet(width=6, depth=depth, norm=norm, out_channels=2)(torch.randn(2, 3, 24, 40))
    assert logits.shape == (2, 2, 24, 40)
    assert torch.isfinite(logits).all()


def test_every_parameter_gets_a_gradient() -> None:
    model = UNet(width=4, depth=2)
    model(torch.randn(1, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_initialisation_keeps_the_scale_of_the_signal() -> None:
    # PyTorch's default shrinks the logits of this network to about 0.05; the initialiser must do something about it.
    torch.manual_seed(0)
    logits = UNet(width=32, depth=4)(torch.randn(2, 3, 64, 64))
    assert 0.3 < logits.std() < 3


def test_build_model_by_name() -> None:
    unet = build_model(ModelConfig(name="unet", width=4, depth=1, norm="batch"))
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in unet.modules())
    options = {"in_channels": 3, "out_channels": 1, "kernel_size": 1}
    conv = build_model(ModelConfig(name="torch.nn:Conv2d", options=options))
    assert isinstance(conv, torch.nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("no_such_package:Net", {}, "No module named 'no_such_package'"),
        ("torch.nn:NoSuchNet", {}, "has no attribute 'NoSuchNet'"),
        ("torch.nn:Conv2d", {"kernel": 3}, "model.options"),
        ("math:floor", {"x": 1}, "model.options"),
        ("builtins:dict", {}, "returned a dict, not an nn.Module"),
    ],
)
def test_a_model_that_is_none_is_told(name: str, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(ModelConfig(name=name, options=options))
