"""The hypergradient of Meta-Weight-Net in float64, against a double backward through the virtual step written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole
from distseg.meta.reduction import OneProcess
from distseg.meta.weight_net import WeightNet, hypergradient

ALPHA = 0.3


@pytest.fixture
def toy():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 1, 1)]
    model, net = nn.Sequential(*layers).double(), WeightNet(hidden=8).double()
    noisy, clean = [], []
    for batches, count in ((noisy, 4), (clean, 3)):
        for _ in range(2):
            masks = torch.randint(0, 2, (count, 9, 11), dtype=torch.uint8)
            masks[0, :3] = 255
            batches.append((torch.randn(count, 3, 9, 11, dtype=torch.float64), masks))
    return model, net, noisy, clean


def ours(model: nn.Module, net: WeightNet, noisy, clean):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return hypergradient(StatelessNetwork(model, Whole(model)), parameters, net, noisy, clean, ALPHA, OneProcess())


def clean_loss_after_the_virtual_step(model: nn.Module, net: nn.Module, noisy, clean) -> torch.Tensor:
    """The paper's procedure in plain torch, over all micro-batches as one; differentiable in φ."""

    def losses(theta, images, masks):
        logits = functional_call(model, theta, (images,))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, (masks == 1).double(), reduction="none")
        return loss[masks != 255]

    (x, y), (xc, yc) = (tuple(torch.cat(part) for part in zip(*batches, strict=True)) for batches in (noisy, clean))
    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    pixels = losses(theta, x, y)
    virtual = (net(pixels.detach()) * pixels).mean()
    inner = torch.autograd.grad(virtual, list(theta.values()), create_graph=True)
    fast = {name: p - ALPHA * g for (name, p), g in zip(theta.items(), inner, strict=True)}
    return losses(fast, xc, yc).mean()


def test_it_is_the_double_backward_through_the_virtual_step(toy) -> None:
    model, net, noisy, clean = toy
    loss = clean_loss_after_the_virtual_step(model, net, noisy, clean)
    expected = torch.autograd.grad(loss, list(net.parameters()))
    actual = ours(model, net, noisy, clean).by_parameter
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-16)


class Stopped(nn.Module):
    """Scales features by numbers that gradients do not pass: where the network stops them, so does every derivative."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = features.square().mean((2, 3), keepdim=True).sqrt()
        return features / scale * features.detach().sin()


def test_gradients_stop_where_the_network_stops_them(toy) -> None:
    model, net, noisy, clean = toy
    model = nn.Sequential(model[0], Stopped(), *model[1:])
    expected = torch.autograd.grad(clean_loss_after_the_virtual_step(model, net, noisy, clean), list(net.parameters()))
    for a, e in zip(ours(model, net, noisy, clean).by_parameter, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-16)


def test_it_is_the_slope_of_the_clean_loss(toy) -> None:
    """A central difference of the clean loss itself, which knows nothing of the derivation."""
    model, net, noisy, clean = toy
    gradient = ours(model, net, noisy, clean).by_parameter
    h, ends = 1e-4, []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for parameter, g in zip(moved.parameters(), gradient, strict=True):
                parameter += sign * h * g / g.norm()
        ends.append(clean_loss_after_the_virtual_step(model, moved, noisy, clean).item())
    expected = sum(g.norm() for g in gradient).item()
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)


def test_it_leaves_network_and_net_alone(toy) -> None:
    model, net, noisy, clean = toy
    before = [p.detach().clone() for module in (model, net) for p in module.parameters()]
    ours(model, net, noisy, clean)
    after = [p for module in (model, net) for p in module.parameters()]
    assert all(torch.equal(b, a) and a.grad is None for b, a in zip(before, after, strict=True))


def test_the_net_starts_by_trusting_every_pixel_and_is_a_function_of_the_loss() -> None:
    torch.manual_seed(0)
    net, losses = WeightNet(), torch.rand(2, 3, 5)
    assert net(losses).shape == losses.shape
    assert net(losses)[0, 0, 0] == net(losses[0, 0, 0])
    assert ((net(losses) > 0) & (net(losses) < 1)).all()
