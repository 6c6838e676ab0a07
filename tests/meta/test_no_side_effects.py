"""Invariant 5 (DESIGN §2): after the meta pass everything is as it was before."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distseg import PixelReweighter, weighted_loss
from distseg.models.unet import UNet

ESTIMATORS = ["forward", "reverse", "finite"]


class Network(nn.Module):
    """All that a pass could change: BatchNorm buffers, dropout's random numbers, a counter, frozen parameters, and
    what is assigned: a buffer, one that was not there yet, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.head = nn.Conv2d(4, 1, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("level", torch.ones(()))
        self.register_buffer("late", None)
        self.count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        features = self.frozen(self.body(images))
        self.level = 0.9 * self.level + features.mean()
        self.late, self.features, self.count = features, features, self.count + 1
        return self.head(features)


def batches(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def batch(count: int, size: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(count, 3, size, size, generator=generator)
        return images, (images.mean(dim=1) > 0).to(torch.uint8)

    return *batch(3, 8), *batch(2, 12)


def state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict:
    return copy.deepcopy(
        {
            "state": model.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "buffers": {name: list(module._buffers) for name, module in model.named_modules()},
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "count": getattr(model, "count", None),
            "optimiser": optimiser.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),  # noqa: NPY002 - the legacy stream is the one to protect
            "python": random.getstate(),
        }
    )


def assert_unchanged(actual, expected, where: str = "") -> None:
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_unchanged(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_unchanged(a, e, f"{where}[{index}]")
    elif isinstance(expected, Tensor | np.ndarray):
        assert np.array_equal(np.asarray(actual), np.asarray(expected)), where
    else:
        assert actual == expected, where


def trained_a_step(model: nn.Module) -> torch.optim.Optimizer:
    """Running statistics, momenta and .grad are then not at their initial values."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images, masks, *_ = batches(seed=9)
    weighted_loss(model(images), masks, torch.full(masks.shape, 1 / masks.numel())).backward()
    optimiser.step()
    if isinstance(model, Network):
        model.level = model.level.detach()
        del model.features
        model.late = None
    return optimiser


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_everything_is_as_before(estimator: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Network()
    optimiser = trained_a_step(model)
    model.train(training)
    model.body[1].eval()  # a module may differ from its parent, as in fine-tuning with fixed statistics
    inputs = batches()
    originals = [tensor.clone() for tensor in inputs]
    parameters = dict(model.named_parameters())
    before = state(model, optimiser)

    PixelReweighter(model, estimator=estimator)(*inputs, true_masks=inputs[1])

    assert_unchanged(state(model, optimiser), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for actual, expected in zip(inputs, originals, strict=True):
        assert torch.equal(actual, expected)
    assert all(tensor.grad is None for tensor in inputs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batchnorm_in_training_mode_keeps_its_statistics(estimator: str) -> None:
    torch.manual_seed(0)
    model = UNet(4, 1, norm="batch")
    optimiser = trained_a_step(model)
    before = state(model, optimiser)
    PixelReweighter(model, estimator=estimator)(*batches())
    assert_unchanged(state(model, optimiser), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_after_the_meta_pass_is_the_step_without_it(estimator: str) -> None:
    """Same dropout units, same statistics, same update, bit for bit."""
    images, masks, *clean = batches()
    weights = torch.rand(masks.shape, generator=torch.Generator().manual_seed(1))

    def step(reweigh: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Network()
        optimiser = trained_a_step(model)
        if reweigh:
            PixelReweighter(model, estimator=estimator)(images, masks, *clean)
        optimiser.zero_grad()
        weighted_loss(model(images), masks, weights).backward()
        optimiser.step()
        return model.state_dict()

    assert_unchanged(dict(step(reweigh=True)), dict(step(reweigh=False)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hooks_on_parameters_are_kept_and_never_called(estimator: str) -> None:
    """DeepSpeed and DDP reduce gradients in such hooks: a call from the meta pass would be a stray collective."""
    torch.manual_seed(0)
    model = UNet(4, 1, norm="group")
    calls = []
    for p in model.parameters():
        p.register_hook(lambda gradient: calls.append("gradient"))
        p.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    model.register_forward_hook(lambda module, inputs, output: None)
    images, masks, *clean = batches()
    weights = PixelReweighter(model, estimator=estimator)(images, masks, *clean)
    assert calls == []
    assert weights.sum().item() == pytest.approx(1, rel=1e-5)
    weighted_loss(model(images), masks, weights).backward()
    count = len(list(model.parameters()))
    assert (calls.count("gradient"), calls.count("accumulated")) == (count, count)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_under_no_grad(estimator: str) -> None:
    torch.manual_seed(0)
    reweighter = PixelReweighter(UNet(4, 1, norm="group"), estimator=estimator)
    expected = reweighter(*batches())
    with torch.no_grad():
        actual = reweighter(*batches())
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_under_autocast_the_meta_pass_stays_in_single_precision(estimator: str) -> None:
    torch.manual_seed(0)
    reweighter = PixelReweighter(UNet(4, 1, norm="group"), estimator=estimator)
    expected = reweighter(*batches())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = reweighter(*batches())
        assert torch.is_autocast_enabled("cpu")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_graph_in_flight_survives(estimator: str) -> None:
    """The weighted loss may be built before the weights are known: the meta pass must not touch what backward saved."""
    torch.manual_seed(0)
    model = UNet(4, 1, norm="batch")
    images, masks, *clean = batches()
    reweighter = PixelReweighter(model, estimator=estimator)

    def gradients(reweigh_in_between: bool) -> list[Tensor]:
        model.zero_grad()
        logits = model(images)
        if reweigh_in_between:
            reweighter(images, masks, *clean)
        weighted_loss(logits, masks, torch.full(masks.shape, 1.0)).backward()
        return [p.grad for p in model.parameters()]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_network_that_raises_leaves_no_trace(estimator: str) -> None:
    torch.manual_seed(0)
    model = Network()
    optimiser = trained_a_step(model)
    parameters = dict(model.named_parameters())
    model.head.register_forward_hook(_raise)
    before = state(model, optimiser)
    with pytest.raises(FloatingPointError):
        PixelReweighter(model, estimator=estimator)(*batches())
    assert_unchanged(state(model, optimiser), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def _raise(*_) -> None:
    raise FloatingPointError
