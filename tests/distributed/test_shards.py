"""Sharded parameters: the collectives' derivatives, networks that run on stand-ins, what is alive and what travels."""

import itertools
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from distseg.distributed.collectives import AllReduce
from distseg.distributed.differentiable import Gather, ReduceScatter, shard_range
from distseg.distributed.shards import ShardedParameters, cut
from distseg.meta import PixelReweighter
from distseg.testing.ranks import run_ranks
from distseg.testing.tensors import AliveTensors, Messages

pytestmark = pytest.mark.slow
SIDE = 8


class Awkward(nn.Module):
    """Parameters where one does not look for them: tied, frozen, unused, of a parent, and read by another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.frozen = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(5, 1, 1) + 0.5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)  # uses its child's weight without calling it
        self.shared = nn.Linear(5, 5)
        self.also_shared = self.shared
        self.head = nn.Conv2d(5, 1, 1)
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, images: Tensor) -> Tensor:
        features = self.frozen(torch.tanh(self.second(torch.tanh(self.first(images)))))
        features = torch.tanh(features * self.gain)
        tokens = self.also_shared(torch.tanh(self.shared(features.flatten(2).mT)))
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=True)
        return self.head(tokens.mT.reshape(features.shape)) * self.gain.shape[0]


def deep_network() -> nn.Module:
    """Many equal layers, so that one of them is small beside all."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.SiLU())]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), *layers, nn.Conv2d(32, 1, 1))


def sharded(model: nn.Module) -> ShardedParameters:
    """Shards that are views of one buffer, as ZeRO-3 has them."""
    shards = {name: cut(p) for name, p in model.named_parameters()}
    flat = torch.cat([shard.elements for shard in shards.values()])
    views = flat.split([len(shard.elements) for shard in shards.values()])
    shards = {name: shard._replace(elements=view) for (name, shard), view in zip(shards.items(), views, strict=True)}
    return ShardedParameters(lambda: shards)


def own(whole: Tensor) -> Tensor:
    return cut(nn.Parameter(whole.detach())).elements


def on_every_rank(runtime) -> dict[str, Tensor]:
    """Errors, relative, by what was checked."""
    return collectives(runtime) | networks(runtime)


def collectives(runtime) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    errors = {}
    for shape in [(2, world), (7,), (2,), ()]:
        torch.manual_seed(0)
        x, v = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        each = torch.randn(world, *shape, dtype=torch.float64)
        errors[f"gather {shape}"] = Gather.apply(own(x), shape) - x
        errors[f"reduce-scatter {shape}"] = ReduceScatter.apply(each[rank]) - own(each.sum(0))
        primal, tangent = torch.func.jvp(lambda s, shape=shape: Gather.apply(s, shape).sin(), (own(x),), (own(v),))
        errors[f"tangent of gather {shape}"] = torch.stack([primal - x.sin(), tangent - x.cos() * v])
        _, tangent = torch.func.jvp(lambda s: ReduceScatter.apply(s.sin()), (each[rank],), (v,))
        errors[f"tangent of reduce-scatter {shape}"] = tangent - own((each.cos() * v).sum(0))

        # Σ over ranks of ⟨weights of the rank, sin x⟩, its gradient, and the gradient of Σ gradient³.
        leaf, whole = own(x).requires_grad_(), x.clone().requires_grad_()
        [first] = torch.autograd.grad((each[rank] * Gather.apply(leaf, shape).sin()).sum(), leaf, create_graph=True)
        [second] = torch.autograd.grad((first**3).sum(), leaf)
        [expected] = torch.autograd.grad((each * whole.sin()).sum(), whole, create_graph=True)
        [expected_second] = torch.autograd.grad((expected**3).sum(), whole)
        errors[f"gradient {shape}"] = first.detach() - own(expected)
        errors[f"second gradient {shape}"] = second - own(expected_second)
    return {name: error.abs().max().reshape(1) if error.numel() else torch.zeros(1) for name, error in errors.items()}


def networks(runtime) -> dict[str, Tensor]:
    """An awkward network on shards beside the same one on whole parameters, summed over the ranks' images."""
    torch.manual_seed(0)
    model = Awkward().double()
    every_image = torch.randn(dist.get_world_size(), 2, 3, SIDE, SIDE, dtype=torch.float64)
    images, placement = every_image[dist.get_rank()], sharded(model)
    whole = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    tangents = {n: torch.randn_like(p) for n, p in whole.items()}

    def run(shards: dict[str, Tensor]) -> Tensor:
        return functional_call(model, placement.operands(shards), (images,))

    shards = placement.trainable()
    assert shards.keys() == whole.keys() and "frozen.weight" not in shards
    actual = torch.func.jvp(run, (shards,), ({n: own(t) for n, t in tangents.items()},))
    expected = torch.func.jvp(lambda theta: functional_call(model, theta, (images,)), (whole,), (tangents,))
    errors = {f"jvp {i}": a - e.detach() for i, (a, e) in enumerate(zip(actual, expected, strict=True))}

    leaves = {n: s.requires_grad_() for n, s in shards.items()}
    with placement.saving_shards():
        first, second = twice(run(leaves).square().sum(), leaves)
    loss = sum(functional_call(model, whole, (batch,)).square().sum() for batch in every_image)
    expected, expected_second = twice(loss, whole)
    for name, g, gg, e, ee in zip(leaves, first, second, expected, expected_second, strict=True):
        assert (e == 0).all() == (name == "unused"), name
        errors[f"gradient {name}"] = (g.detach() - own(e)) / e.abs().max().clamp(min=1e-6)
        errors[f"second gradient {name}"] = (gg - own(ee)) / ee.abs().max().clamp(min=1e-6)
    return {name: error.abs().max().reshape(1) if error.numel() else torch.zeros(1) for name, error in errors.items()}


def twice(loss: Tensor, leaves: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The gradient of the loss, and that of the sum of its cubes."""
    first = torch.autograd.grad(loss, leaves.values(), create_graph=True, materialize_grads=True)
    return first, torch.autograd.grad(sum((g**3).sum() for g in first), leaves.values(), materialize_grads=True)


@pytest.mark.parametrize("world_size", [1, 3])
def test_shards_compute_what_whole_parameters_do(world_size: int) -> None:
    for actual in run_ranks(on_every_rank, world_size):
        wrong = {name: error.item() for name, error in actual.items() if not error < 1e-11}
        assert not wrong


def alive_and_sent(runtime) -> dict[str, Tensor]:
    """Peak bytes of parameter-like tensors in a meta pass, and what the pass sends, by placement and estimator."""
    model, out = deep_network(), {}
    torch.manual_seed(1 + dist.get_rank())
    batch = torch.randn(1, 3, SIDE, SIDE), torch.randint(0, 2, (1, SIDE, SIDE))
    for sharing, estimator in itertools.product((True, False), ("forward", "reverse", "finite")):
        placement = sharded(model) if sharing else None
        reweighter = PixelReweighter(
            model, estimator=estimator, reduction=AllReduce(sharing), placement=placement, initial_weight=0.5
        )
        with AliveTensors(lambda tensor: tensor.shape[-2:] != (SIDE, SIDE)) as alive:
            reweighter.weigh([batch], [batch])
        out[f"alive {sharing} {estimator}"] = torch.tensor(alive.peak)
        reweighter.initial_weight = 0.0
        with Messages() as messages:
            reweighter.weigh([batch], [batch])
        calls, elements = Counter(), Counter()
        for name, count in messages.sent:
            calls[name] += 1
            elements[name] += count
        for name in calls:
            out[f"sent {sharing} {estimator} {name}"] = torch.tensor([calls[name], elements[name]])
        if not sharing:
            out[f"in order {estimator}"] = torch.tensor([count for _, count in messages.sent])
    return out


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, Tensor]:
    return run_ranks(alive_and_sent, 4)[0]


def test_no_more_is_alive_than_the_share_and_the_layer_at_work(four_ranks: dict[str, Tensor]) -> None:
    sizes = [p.numel() for p in deep_network().parameters()]
    share, layer = sum(-(-size // 4) for size in sizes) * 4, max(sizes) * 4
    # Shards of the parameters, of the fast weights and of g. And of the layer at work its weight, with its gradient,
    # tangent or both, or the backend's copy of one.
    for estimator in ("forward", "reverse", "finite"):
        peak = four_ranks[f"alive True {estimator}"].item()
        assert peak < 3 * share + 3.2 * layer, f"{estimator}: {peak / share:.2f} shares, {peak / layer:.2f} layers"
        assert four_ranks[f"alive False {estimator}"] > 3 * sum(sizes) * 4


@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite"])
def test_whole_parameters_take_one_reduction_of_g_and_one_of_eight_numbers(four_ranks, estimator: str) -> None:
    parameters = sum(p.numel() for p in deep_network().parameters())
    assert four_ranks[f"in order {estimator}"].tolist() == [parameters + 1, 8]


@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite"])
def test_what_shards_take_is_what_it_is_said_to_be(four_ranks, estimator: str) -> None:
    """In a rank's elements: `every` parameter, or the `weights`, which a backward pass needs again."""

    def put_in(names: list[str]) -> Tensor:
        sizes = {name: p.numel() for name, p in deep_network().named_parameters()}
        return torch.tensor([len(names), sum(-(-sizes[name] // 4) for name in names)])

    names = [name for name, _ in deep_network().named_parameters()]
    every, weights = put_in(names), put_in([name for name in names if name.endswith("weight")])
    clean = every + weights
    gathers = {
        "forward": clean + 2 * every,  # parameters and tangents
        "finite": clean + 2 * every,  # θ + h·g and θ − h·g
        "reverse": clean + 2 * every + 2 * weights,  # forward, inner backward, and its transpose along g
    }[estimator]
    # Every rank puts in a reduce-scatter what it has of the whole, padded to equal shards.
    scatters = torch.tensor([1, 4]) * every * (2 if estimator == "reverse" else 1)
    assert four_ranks[f"sent True {estimator} allgather_base"].tolist() == gathers.tolist()
    assert four_ranks[f"sent True {estimator} reduce_scatter_base"].tolist() == scatters.tolist()
    # The count of valid pixels, ‖g‖, and eight numbers; `finite` scales its step by ‖θ‖ and ‖g‖.
    scalars = [5, 12] if estimator == "finite" else [3, 10]
    assert four_ranks[f"sent True {estimator} allreduce"].tolist() == scalars


def test_shards_cover_every_element_once() -> None:
    for count, world in itertools.product((0, 1, 3, 4, 5, 8, 9), (1, 2, 3, 4)):
        ranges = [shard_range(count, rank, world) for rank in range(world)]
        assert [i for own_range in ranges for i in own_range] == list(range(count))
        assert max(map(len, ranges)) == -(-count // world)
