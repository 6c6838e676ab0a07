"""The model of what ranks send in one step: every collective of distseg and of DeepSpeed 0.19.8, in order.

A message is a collective of one rank: the operator of c10d, and the bytes that this rank puts into it. The model is
written from how the two work, not from a record of them; `benchmarks/fake_world.py` and its tests hold it against the
real step. It is for networks of convolutions with a bias, such as the U-Net without normalisation, in float32, and for
a step that is not the first: DeepSpeed's ZeRO-3 compares its order of modules over the ranks before it trusts it.

    n elements in N shards    ceil(n / N) on each rank, padded
    distseg, whole            g in runs of at least 25 MiB from the last parameter to the first, the count of valid
                              pixels in the last one; then eight numbers
    distseg, sharded          for each operator its gathers in the forward pass, and in the backward pass the weight
                              again and a reduce-scatter of both derivatives; tangents are gathered beside
    DeepSpeed 0, 1            the whole gradient after the last micro-batch, in buckets of 5·10⁸ elements
    DeepSpeed 2               the same after every micro-batch. Stages 1 and 2 reduce by all-reduces, not to the owner
    DeepSpeed 1, 2            then a norm, and each rank's partition, gathered
    DeepSpeed 3               gathers in the forward and the backward pass, reduce-scatters, a norm
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

ESTIMATORS = ("forward", "reverse", "finite")
STEPS = ("plain", *ESTIMATORS)
"""A plain step has uniform weights; the others weigh their images by an estimator."""
CLEAN_BUCKET = 25 * 2**20 // 4
"""Elements of a bucket of g."""
STAGE_0_BUCKET = 500_000_000
"""Of a bucket of DeepSpeed without ZeRO, whatever its configuration says."""
FLOAT, DOUBLE = 4, 8
"""Bytes of an element."""


class Message(NamedTuple):
    asker: str
    """`distseg` or `deepspeed`."""
    operator: str
    size: int
    """Bytes that one rank puts in."""
    numbers: bool = False
    """Whether it is a few numbers, for which everything waits, and not a gradient or a parameter."""


class Layer(NamedTuple):
    """Elements of one convolution's parameters."""

    weight: int
    bias: int


@dataclass(frozen=True)
class Network:
    used: tuple[Layer, ...]
    """In the order in which the forward pass uses them."""
    registered: tuple[int, ...]
    """Elements of each parameter, in the order of `module.parameters()`."""

    @property
    def parameters(self) -> int:
        return sum(self.registered)


def network_of(module: nn.Module, side: int) -> Network:
    """Of a module of convolutions; it runs on the meta device, on one image of side × side pixels."""
    used: list[Layer] = []
    trial = module.to("meta")

    def note(layer: nn.Module, *_: object) -> None:
        used.append(Layer(*(parameter.numel() for parameter in layer.parameters(recurse=False))))

    hooks = [layer.register_forward_hook(note) for layer in trial.modules() if list(layer.parameters(recurse=False))]
    trial(torch.empty(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return Network(tuple(used), tuple(parameter.numel() for parameter in trial.parameters()))


@dataclass(frozen=True)
class World:
    ranks: int
    stage: int
    accumulation: int = 1
    lean: bool = False
    """Whether ZeRO-3 runs with configs/deepspeed/zero3_lean.json: nothing is kept, fetched ahead or put in buckets."""
    bucket: int = 500_000_000
    """DeepSpeed's `reduce_bucket_size`, in elements."""


def step(network: Network, world: World, kind: str) -> list[Message]:
    """Every collective of a step of `kind` (STEPS), in order.

    Under ZeRO-3 that is not lean, DeepSpeed's gathers stand one by one at the beginning of its part: how it joins them
    and when it fetches them is not modelled, nor a network of more than 10⁹ parameters, some of which it gathers twice.
    Nor is what `is_modelled` says.
    """
    if world.ranks == 1:
        return []
    ours = uniform_weights() if kind == "plain" else meta_pass(network, world, kind)
    flags = _numbers("distseg", FLOAT * (world.ranks + 1))
    before, after = _deepspeed(network, world)
    return [*ours, *before, flags, *after]


def is_modelled(network: Network, world: World) -> bool:
    """Not where stages 1 and 2 cut a gradient that has more elements than DeepSpeed's bucket."""
    return world.stage not in (1, 2) or max(network.registered) <= world.bucket


def uniform_weights() -> list[Message]:
    """The number of valid pixels."""
    return [_numbers("distseg", DOUBLE)]


def meta_pass(network: Network, world: World, estimator: str) -> list[Message]:
    eight = _numbers("distseg", 8 * DOUBLE)
    if world.stage < 3:
        return [*_clean_buckets(network), eight]
    gathers = _Sharded(network, world.ranks)
    norm = _numbers("distseg", DOUBLE)
    clean = [*gathers.forward(), *gathers.backward()]
    noisy = {
        "forward": list(gathers.forward(copies=2)),
        "reverse": [*clean, *gathers.double_backward()],
        "finite": [norm, norm, *gathers.forward(), *gathers.forward()],
    }[estimator]
    count = _numbers("distseg", FLOAT)
    return [*clean * world.accumulation, count, *noisy * world.accumulation, norm, eight]


def _clean_buckets(network: Network) -> Iterator[Message]:
    sizes = _runs(reversed(network.registered), CLEAN_BUCKET)
    sizes[-1] += 1
    return (Message("distseg", "allreduce", FLOAT * size) for size in sizes)


@dataclass(frozen=True)
class _Sharded:
    """Passes of distseg through a network whose parameters lie in shards."""

    network: Network
    ranks: int

    def forward(self, copies: int = 1) -> Iterator[Message]:
        for layer in self.network.used:
            for elements in layer:
                yield from [self._gather(elements)] * copies

    def backward(self) -> Iterator[Message]:
        for layer in reversed(self.network.used):
            yield from (self._gather(layer.weight), self._scatter(layer.bias), self._scatter(layer.weight))

    def double_backward(self) -> Iterator[Message]:
        """The transposes of the reduce-scatters, and the weight that the operator saved."""
        for layer in self.network.used:
            yield from (self._gather(elements) for elements in (layer.weight, layer.bias, layer.weight))

    def _gather(self, elements: int) -> Message:
        return Message("distseg", "allgather_base", FLOAT * _shard(elements, self.ranks))

    def _scatter(self, elements: int) -> Message:
        return Message("distseg", "reduce_scatter_base", FLOAT * self.ranks * _shard(elements, self.ranks))


def _deepspeed(network: Network, world: World) -> tuple[list[Message], list[Message]]:
    """What DeepSpeed sends up to the last gradient, and after it."""
    if world.stage == 3:
        return _stage_3_lean(network, world) if world.lean else _stage_3(network, world)

    def reduced(sizes: Iterable[int]) -> list[Message]:
        return [_ds("allreduce", size) for size in sizes]

    if world.stage == 0:
        return reduced(_runs_above(network.registered)), []
    partition = 2 * math.ceil(network.parameters / (2 * world.ranks))
    after = [_numbers("deepspeed", FLOAT), _ds("allgather_base", partition)]
    if world.stage == 1:
        return reduced(_runs_up_to(network.registered, world.bucket)), after
    made = [elements for layer in reversed(network.used) for elements in layer]
    return reduced(_runs_up_to(made, world.bucket)) * world.accumulation, after


def _stage_3(network: Network, world: World) -> tuple[list[Message], list[Message]]:
    kept = 100_000  # parameters of so many elements and fewer stay whole, and are gathered after the update
    gathers = [
        _ds("allgather_base", _shard(elements, world.ranks))
        for layer in network.used
        for elements in layer
        if elements > kept
    ]
    made = [world.ranks * _shard(elements, world.ranks) for layer in reversed(network.used) for elements in layer]
    scatters = [_ds("reduce_scatter_base", size) for size in _runs_up_to(made, world.bucket)]
    small = [
        _ds("allgather_base", _shard(elements, world.ranks)) for elements in network.registered if elements <= kept
    ]
    return [*gathers, *scatters] * world.accumulation, [_numbers("deepspeed", DOUBLE), *small]


def _stage_3_lean(network: Network, world: World) -> tuple[list[Message], list[Message]]:
    def gather(layer: Layer) -> Message:
        return _ds("allgather_base", sum(_shard(elements, world.ranks) for elements in layer))

    def backward() -> Iterator[Message]:
        waiting: list[Message] = []  # a gradient leaves when the next one comes
        for layer in reversed(network.used):
            yield gather(layer)
            for elements in layer:
                yield from waiting
                waiting = [_ds("reduce_scatter_base", world.ranks * _shard(elements, world.ranks))]
        yield from waiting

    passes = [*(gather(layer) for layer in network.used), *backward()]
    return passes * world.accumulation, [_numbers("deepspeed", DOUBLE)]


def _numbers(asker: str, size: int) -> Message:
    return Message(asker, "allreduce", size, numbers=True)


def _ds(operator: str, elements: int) -> Message:
    return Message("deepspeed", operator, FLOAT * elements)


def _shard(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def _runs(sizes: Iterable[int], least: int) -> list[int]:
    """Sums of runs of at least `least`, but for the last."""
    runs = [0]
    for size in sizes:
        if runs[-1] >= least:
            runs.append(0)
        runs[-1] += size
    return runs


def _runs_above(sizes: Sequence[int]) -> list[int]:
    """As DeepSpeed's stage 0 cuts them: a run ends with the element that brings it above the bucket."""
    return _runs(sizes, STAGE_0_BUCKET + 1)


def _runs_up_to(sizes: Sequence[int], bucket: int) -> list[int]:
    """As its other stages do: a run ends before the element that would bring it above the bucket."""
    runs = [0]
    for size in sizes:
        if runs[-1] and runs[-1] + size > bucket:
            runs.append(0)
        runs[-1] += size
    return runs
