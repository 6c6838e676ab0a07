"""One forward pass for logits and tangents: the same numbers as two passes, and two where one cannot be."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from distseg import PixelReweighter, weighted_loss
from distseg.models.unet import UNet

SIZE = 16


class Odd(nn.Module):
    """What a network may do beside the U-Net's: dropout, a tied, an unused and a frozen parameter, stopped gradients,
    in-place functions, a channels-last parameter, statistics of its own, a checkpointed part if wished."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.first.bias.requires_grad_(False)
        self.instance, self.layer = nn.InstanceNorm2d(8, affine=True), nn.LayerNorm((8, SIZE, SIZE))
        self.second, self.tied = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.second.weight
        self.unused, self.head, self.drop = nn.Linear(3, 3), nn.Conv2d(8, 1, 1), nn.Dropout(0.3)
        self.register_buffer("level", torch.ones(()))
        self.checkpointed = checkpointed

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu_(self.instance(self.first(images)))
        with torch.no_grad():
            self.level.mul_(0.9).add_(features.mean())
            shift = features.mean()
        features = self.drop(features) * (1 + shift) + features.detach().mean()
        features = (
            checkpoint(self.middle, features, use_reentrant=False) if self.checkpointed else self.middle(features)
        )
        first, second = self.layer(features).sigmoid_().chunk(2, dim=1)
        return self.head(torch.cat([second, first], dim=1))

    def middle(self, features: Tensor) -> Tensor:
        return self.tied(torch.relu(self.second(features)))


class Watching(nn.Module):
    """Computes something else where it is given tangents beside gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        both = features.requires_grad and forward_ad.unpack_dual(features).tangent is not None
        return self.head(features * (1.5 if both else 1.0))


NETWORKS = {
    "no norm": lambda: UNet(4, 2, "none"),
    "batch norm": lambda: UNet(4, 2, "batch"),
    "group norm": lambda: UNet(4, 2, "group"),
    "two channels": lambda: UNet(4, 1, "group", out_channels=2),
    "odd": Odd,
    "checkpointed": lambda: Odd(checkpointed=True),
}


def network_and_batches(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    images, masks = torch.randn(6, 3, SIZE, SIZE, dtype=dtype), torch.randint(0, 2, (6, SIZE, SIZE))
    masks[0, :5] = 255
    return network, (images[:4], masks[:4], images[4:], masks[4:])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("granularity", ["pixel", "patch(4)"])
def test_one_pass_is_two_passes(name: str, granularity: str) -> None:
    network, batches = network_and_batches(name, torch.float64)
    twin = copy.deepcopy(network)
    reweighter, of_twin = (PixelReweighter(each, granularity=granularity) for each in (network, twin))
    for _ in range(2):  # the first call also tries whether the network can
        network.zero_grad()
        twin.zero_grad()
        state = torch.get_rng_state()
        logits, weights, clean = reweighter.one_pass(*batches, true_masks=batches[1].roll(1, 1))
        weighted_loss(logits, batches[1], weights).backward()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected = of_twin(*batches, true_masks=batches[1].roll(1, 1))
        expected_logits = twin(batches[0])
        weighted_loss(expected_logits, batches[1], expected).backward()
        assert torch.equal(after, torch.get_rng_state())
        close(weights, expected)
        close(logits, expected_logits)
        for key, value in of_twin.diagnostics.items():
            close(reweighter.diagnostics[key], value)
        for (key, actual), own in zip(network.named_parameters(), twin.parameters(), strict=True):
            assert (actual.grad is None) == (own.grad is None), key
            if own.grad is not None:
                close(actual.grad, own.grad)
        for actual, own in zip(network.buffers(), twin.buffers(), strict=True):
            close(actual, own)
        assert clean.gradient.keys() == {key for key, p in network.named_parameters() if p.requires_grad}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_the_clean_loss_and_its_gradient_are_those_of_a_pass_of_the_clean_batch() -> None:
    network, batches = network_and_batches("group norm", torch.float64)
    clean = PixelReweighter(network).one_pass(*batches).clean
    loss = weighted_loss(network(batches[2]), batches[3], torch.ones(2, SIZE, SIZE, dtype=torch.float64))
    loss = loss / (batches[3] != 255).sum()
    close(clean.loss, loss.detach())
    for (name, parameter), expected in zip(
        network.named_parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True
    ):
        assert parameter.shape == expected.shape
        close(clean.gradient[name], expected)


@pytest.mark.parametrize(
    ("name", "can"), [("odd", True), ("checkpointed", False), ("batch norm", True), ("group norm", True)]
)
def test_a_network_is_tried_once_and_left_as_it_was(name: str, can: bool) -> None:
    network, (images, _, *clean) = network_and_batches(name, torch.float32)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    reweighter = PixelReweighter(network)
    loss = reweighter.clean_loss([tuple(clean)])
    assert reweighter.takes_one_pass(loss, images) is can
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    network.head = None  # a second trial would fail
    assert reweighter.takes_one_pass(loss, images) is can


def test_two_passes_where_the_trial_finds_other_numbers() -> None:
    torch.manual_seed(0)
    images, masks = torch.randn(2, 3, SIZE, SIZE), torch.randint(0, 2, (2, SIZE, SIZE))
    reweighter = PixelReweighter(Watching())
    assert not reweighter.takes_one_pass(reweighter.clean_loss([(images, masks)]), images)


def test_autocast_takes_two_passes() -> None:
    network, (images, _, *clean) = network_and_batches("no norm", torch.float32)
    reweighter = PixelReweighter(network)
    loss = reweighter.clean_loss([tuple(clean)])
    with torch.autocast("cpu", torch.bfloat16):
        assert not reweighter.takes_one_pass(loss, images)
    assert reweighter.takes_one_pass(loss, images)


class Held:
    """A tensor that autograd has saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_by(forward: Callable[[], Tensor]) -> int:
    """Elements that autograd holds at the peak of a forward pass."""
    alive: weakref.WeakSet[Held] = weakref.WeakSet()
    sizes = []

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        alive.add(held)
        sizes.append(sum(each.tensor.numel() for each in alive))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        logits = forward()
    assert logits.requires_grad
    return max(sizes)


NORMS = [
    nn.Identity(),
    nn.BatchNorm2d(4),
    nn.GroupNorm(2, 4),
    nn.InstanceNorm2d(4, affine=True),
    nn.LayerNorm((4, 8, 8)),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_tangents_leave_no_graph(norm: nn.Module) -> None:
    torch.manual_seed(0)
    block = [nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU(inplace=True), nn.Dropout(), nn.GELU()]
    blocks = [copy.deepcopy(layer) for _ in range(6) for layer in block]
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), *blocks, nn.MaxPool2d(2), nn.Conv2d(4, 1, 1), nn.Upsample(scale_factor=2)
    )
    images, masks = torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8))
    reweighter = PixelReweighter(network)
    clean = reweighter.clean_loss([(images, masks)])
    expected = saved_by(lambda: network(images))
    # By itself, because `one_pass` would take two passes where this one fails.
    actual = saved_by(lambda: reweighter.carry(clean, network, images)[0])
    assert expected <= actual < 1.2 * expected, actual / expected
