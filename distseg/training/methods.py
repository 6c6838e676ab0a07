"""The step of each method: which images it learns from, and the weight of each of their pixels.

Every method is the same update, ∇ Σ W·ℓ over the global batch with ΣW = 1, and differs only in where its images come
from and in W. `draw(step)` yields this rank's micro-batches of a step with their weight maps.

    noisy_only      noisy stream                          W uniform
    clean_only      clean stream                          W uniform
    union           half noisy, half clean in each batch  W uniform
    finetune        noisy, then clean (clean_phase)       W uniform
    oracle          every training image, true masks      W uniform
    image_reweight  noisy stream                          W from the clean gradient, per image (Ren et al. 2018)
    pixel_reweight  noisy stream                          W from the clean gradient (Mirikharaji et al. 2019)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from distseg.config.schema import Config
from distseg.data.manifest import Sample
from distseg.data.streams import Batch, Stream
from distseg.meta import PixelReweighter
from distseg.meta.estimators import SumOverRanks
from distseg.meta.weights import Diagnostics, WeightMap, joined, uniform_weights


@dataclass(frozen=True)
class WeightedBatch:
    """One rank's micro-batch and its weight map; the weights of a step sum to 1 over micro-batches and ranks."""

    batch: Batch
    weights: WeightMap


class Method(Protocol):
    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        """The step's micro-batches, and what is to be said of their weights; true masks serve only to `diagnose`."""


class OpenStream(Protocol):
    def __call__(self, name: str, samples: Sequence[Sample], labels: str, batch_size: int) -> Stream: ...


def build_method(
    config: Config,
    noisy: Sequence[Sample],
    clean: Sequence[Sample],
    steps: int,
    open_stream: OpenStream,
    reweighter: Callable[[str], PixelReweighter],
    sum_over_ranks: SumOverRanks,
) -> Method:
    """The method that `config.method` names, over the noisy and clean samples; `reweighter` takes a granularity."""
    name, size, accumulation = config.method.name, config.train.batch_size, config.train.accumulation

    if name in ("image_reweight", "pixel_reweight"):
        return Reweighted(
            noisy=open_stream("noisy", noisy, "noisy", size),
            clean=open_stream("clean", clean, "true", config.train.clean_batch_size),
            accumulation=accumulation,
            reweighter=reweighter("image" if name == "image_reweight" else config.method.granularity),
            include_clean=config.method.include_clean,
            sum_over_ranks=sum_over_ranks,
        )

    def uniform(streams_at: Callable[[int], Sequence[Stream]]) -> Uniform:
        return Uniform(streams_at, accumulation, sum_over_ranks)

    if name == "noisy_only":
        stream = open_stream("noisy", noisy, "noisy", size)
        return uniform(lambda step: [stream])
    if name == "clean_only":
        stream = open_stream("clean", clean, "true", size)
        return uniform(lambda step: [stream])
    if name == "oracle":
        stream = open_stream("oracle", [*noisy, *clean], "true", size)
        return uniform(lambda step: [stream])
    if name == "union":
        halves = [open_stream("noisy", noisy, "noisy", size // 2), open_stream("clean", clean, "true", size // 2)]
        return uniform(lambda step: halves)
    assert name == "finetune", name
    first, then = open_stream("noisy", noisy, "noisy", size), open_stream("clean", clean, "true", size)
    switch = round(steps * (1 - config.method.clean_phase))
    return uniform(lambda step: [first] if step < switch else [then])


@dataclass(frozen=True)
class Uniform:
    """Every valid pixel of the step's streams counts the same."""

    streams_at: Callable[[int], Sequence[Stream]]
    accumulation: int
    sum_over_ranks: SumOverRanks

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        streams = self.streams_at(step)
        batches = [_join([s.batch(step, micro) for s in streams]) for micro in range(self.accumulation)]
        weights = uniform_weights([b.masks for b in batches], self.sum_over_ranks, batches[0].images.dtype)
        return [WeightedBatch(b, w) for b, w in zip(batches, weights, strict=True)], {}


@dataclass(frozen=True)
class Reweighted:
    """Every noisy pixel counts by how well its gradient agrees with the clean gradient at the present parameters."""

    noisy: Stream
    clean: Stream
    accumulation: int
    reweighter: PixelReweighter
    include_clean: bool
    sum_over_ranks: SumOverRanks

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        noisy = [self.noisy.batch(step, micro) for micro in range(self.accumulation)]
        clean = [self.clean.batch(step, micro) for micro in range(self.accumulation)]
        weights = self.reweighter.weigh(
            [(b.images, b.masks) for b in noisy],
            [(b.images, b.masks) for b in clean],
            [b.true_masks for b in noisy] if diagnose else None,
        )
        if self.include_clean:
            clean_weights = uniform_weights([b.masks for b in clean], self.sum_over_ranks, weights[0].scale.dtype)
            pairs = list(zip(noisy, clean, strict=True))
            weights = [
                joined(maps, [batch.masks for batch in pair]).times(0.5)
                for maps, pair in zip(zip(weights, clean_weights, strict=True), pairs, strict=True)
            ]
            noisy = [_join(pair) for pair in pairs]
        return [WeightedBatch(b, w) for b, w in zip(noisy, weights, strict=True)], self.reweighter.diagnostics


def _join(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(
        images=torch.cat([b.images for b in batches]),
        masks=torch.cat([b.masks for b in batches]),
        true_masks=torch.cat([b.true_masks for b in batches]),
        ids=tuple(i for b in batches for i in b.ids),
    )
