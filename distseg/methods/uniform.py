"""Every valid pixel counts the same: the baselines that differ in where their images come from."""

from collections.abc import Callable, Sequence

from distseg.data.streams import Stream
from distseg.meta.weights import Diagnostics
from distseg.methods.step import Method, Parts, WeightedBatch, evenly_weighted, joined_batches


class Uniform(Method):
    """W = 1/N over the streams that `streams_at(step)` names."""

    def __init__(self, parts: Parts, streams_at: Callable[[int], Sequence[Stream]]) -> None:
        self.streams_at, self.sum_over_ranks = streams_at, parts.sum_over_ranks
        self.accumulation = parts.config.train.accumulation

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        streams = self.streams_at(step)
        batches = [joined_batches([s.batch(step, micro) for s in streams]) for micro in range(self.accumulation)]
        return evenly_weighted(batches, self.sum_over_ranks), {}


def noisy_only(parts: Parts) -> Uniform:
    stream = parts.noisy_stream()
    return Uniform(parts, lambda step: [stream])


def clean_only(parts: Parts) -> Uniform:
    stream = parts.clean_stream(parts.config.train.batch_size)
    return Uniform(parts, lambda step: [stream])


def oracle(parts: Parts) -> Uniform:
    stream = parts.open_stream("oracle", [*parts.noisy, *parts.clean], "true", parts.config.train.batch_size)
    return Uniform(parts, lambda step: [stream])


def union(parts: Parts) -> Uniform:
    half = parts.config.train.batch_size // 2
    halves = [parts.noisy_stream(half), parts.clean_stream(half)]
    return Uniform(parts, lambda step: halves)


def finetune(parts: Parts) -> Uniform:
    first, then = parts.noisy_stream(), parts.clean_stream(parts.config.train.batch_size)
    switch = parts.clean_from
    return Uniform(parts, lambda step: [first] if step < switch else [then])
