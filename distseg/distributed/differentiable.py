"""Collectives as linear functions of every rank's tensor, differentiable any number of times and in either mode.

The function that is differentiated is the sum over ranks of what each rank computes, and every rank takes part in each
pass. Gather and ReduceScatter are each other's transpose, so the cotangents of a gathered tensor come back summed over
the ranks and cut into shards; a tangent travels as its primal does.

A shard is the r-th of N equal runs of a tensor's elements, the last ones shorter where N does not divide their number:
ceil(n / N) elements on the first ranks, down to none on the last. This is how ZeRO-3 cuts a parameter.
"""

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_range(count: int, rank: int, world_size: int) -> range:
    """Which of the `count` elements of a flattened tensor lie on `rank`."""
    size = -(-count // world_size)
    return range(min(rank * size, count), min((rank + 1) * size, count))


class Gather(Function):
    """The tensor of `shape` whose shards the ranks hold; `shard` (n,) is this rank's."""

    @staticmethod
    def forward(shard: Tensor, shape: tuple[int, ...]) -> Tensor:
        return gather(shard, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.shape = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return ReduceScatter.apply(cotangent), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Any:
        return Gather.apply(tangent, ctx.shape)


class ReduceScatter(Function):
    """This rank's shard (n,) of the sum over ranks of `whole`."""

    @staticmethod
    def forward(whole: Tensor) -> Tensor:
        count, ranks = whole.numel(), dist.get_world_size()
        size = -(-count // ranks)
        flat = whole.contiguous().view(-1)
        if count != size * ranks:
            flat = torch.nn.functional.pad(flat, (0, size * ranks - count))
        shard = flat.new_empty(size)
        _reduce_scatter(shard, flat)
        return shard[: len(shard_range(count, dist.get_rank(), ranks))].clone() if count != size * ranks else shard

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return Gather.apply(cotangent, ctx.shape)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return ReduceScatter.apply(tangent)


def gather(shard: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What Gather computes, without a derivative."""
    count, ranks = prod(shape), dist.get_world_size()
    size = -(-count // ranks)
    own = shard.contiguous()
    if len(own) != size:
        own = torch.nn.functional.pad(own, (0, size - len(own)))
    flat = own.new_empty(size * ranks)
    _all_gather(flat, own)
    return flat[:count].view(shape)
