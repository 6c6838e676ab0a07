"""Class weights are part of the loss: U, the clean gradient and the weights follow, whatever the estimator."""

import oracle
import pytest
import torch
from oracle import IGNORE, double_backward, loss_map, normalised
from torch import Tensor, nn

from distseg import PixelReweighter
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole
from distseg.meta.reduction import OneProcess
from distseg.meta.weight_net import WeightNet, hypergradient


def network(classes: int) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, classes, 3, padding=1)]
    return nn.Sequential(*layers).double()


def batch(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 9, 7, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, max(classes, 2), (count, 9, 7), generator=generator, dtype=torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORE
    return images, masks


def weighted_loss_map(class_weights: Tensor):
    """The oracle's loss of a pixel, times the weight of its class: looked up one class at a time."""

    def of(logits: Tensor, masks: Tensor) -> Tensor:
        return sum(v * (masks == c) * loss_map(logits, masks) for c, v in enumerate(class_weights))

    return of


def some(classes: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    class_weights = torch.tensor([0.5, 8.0, 3.0, 0.1][: max(2, classes)], dtype=torch.float64)
    return network(classes), batch(3, classes, 1), batch(2, classes, 2), class_weights


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("initial_weight", [0.0, 5.0])
@pytest.mark.parametrize(("estimator", "rtol"), [("forward", 1e-10), ("reverse", 1e-10), ("finite", 1e-5)])
def test_weights_are_those_of_the_double_backward_through_the_weighted_loss(
    estimator: str, rtol: float, initial_weight: float, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, noisy, clean, class_weights = some(classes)
    without = normalised(double_backward(model, noisy, clean, alpha=0.4, initial_weight=initial_weight))
    monkeypatch.setattr(oracle, "loss_map", weighted_loss_map(class_weights))
    expected = normalised(double_backward(model, noisy, clean, alpha=0.4, initial_weight=initial_weight))
    options = {"virtual_lr": 0.4, "initial_weight": initial_weight, "class_weights": class_weights}
    actual = PixelReweighter(model, estimator=estimator, **options)(*noisy, *clean)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.max().item())
    assert (expected - without).abs().max() > 0.1 * expected.max(), "the class weights hardly matter"


@pytest.mark.parametrize("granularity", ["pixel", "patch(3)", "image"])
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_class_weights_of_one_change_nothing(estimator: str, granularity: str) -> None:
    model, noisy, clean, _ = some(3)
    expected = PixelReweighter(model, estimator=estimator, granularity=granularity)(*noisy, *clean)
    ones = torch.ones(3, dtype=torch.float64)
    actual = PixelReweighter(model, estimator=estimator, granularity=granularity, class_weights=ones)(*noisy, *clean)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_the_hypergradient_is_the_slope_of_the_weighted_clean_loss() -> None:
    """By a central difference of that loss after a virtual step of the weighted loss, in plain torch."""
    model, noisy, clean, class_weights = some(1)
    torch.manual_seed(0)
    net = WeightNet(hidden=8).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    losses = weighted_loss_map(class_weights)

    def clean_loss(net: WeightNet) -> float:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        pixels = losses(torch.func.functional_call(model, leaves, (noisy[0],)), noisy[1])
        count = (noisy[1] != IGNORE).sum()
        virtual = (net(pixels).detach() * pixels).sum() / count
        step = torch.autograd.grad(virtual, list(leaves.values()))
        fast = {name: p - 0.3 * g for (name, p), g in zip(parameters.items(), step, strict=True)}
        after = losses(torch.func.functional_call(model, fast, (clean[0],)), clean[1])
        return (after.sum() / (clean[1] != IGNORE).sum()).item()

    stateless = StatelessNetwork(model, Whole(model))
    gradient = hypergradient(stateless, parameters, net, [noisy], [clean], 0.3, OneProcess(), class_weights)
    total = sum(g.square().sum() for g in gradient.by_parameter).sqrt()
    ends = []
    for sign in (1, -1):
        moved = WeightNet(hidden=8).double()
        moved.load_state_dict(net.state_dict())
        with torch.no_grad():
            for parameter, g in zip(moved.parameters(), gradient.by_parameter, strict=True):
                parameter += sign * 1e-4 * g / total
        ends.append(clean_loss(moved))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(total.item(), rel=1e-5)
