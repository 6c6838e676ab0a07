"""What a method is to the trainer, and what it is built from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.data.manifest import Sample
from distseg.data.streams import Batch, Stream
from distseg.meta import PixelReweighter
from distseg.meta.reduction import ByFunction, SumOverRanks
from distseg.meta.weights import Diagnostics, WeightMap, joined, uniform_weights
from distseg.ops import weighted_loss


@dataclass(frozen=True)
class WeightedBatch:
    """One rank's micro-batch and its weight map; the weights of a step sum to 1 over micro-batches and ranks."""

    batch: Batch
    weights: WeightMap


class Method:
    """A step: where its images come from, the weight of each pixel, and the loss that the weights are of."""

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        """The step's micro-batches, and what is to be said of their weights; true masks serve only to `diagnose`."""
        raise NotImplementedError

    def loss(self, logits: Tensor, masks: Tensor, weights: WeightMap) -> Tensor:
        """Σ W·ℓ of one micro-batch, a scalar, from logits (B, C, H, W) and masks (B, H, W)."""
        return weighted_loss(logits, masks, *weights)

    def finish_step(self, lr: float) -> None:
        """After the network's update at rate `lr`: what the method itself learns."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the method has learned, the same on every rank, by name; empty for most."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


class BuildReweighter(Protocol):
    def __call__(self, granularity: str, transform: str = ...) -> PixelReweighter: ...


class OpenStream(Protocol):
    def __call__(self, name: str, samples: Sequence[Sample], labels: str, batch_size: int) -> Stream: ...


@dataclass(frozen=True)
class Parts:
    """What a method may be built from."""

    config: Config
    noisy: Sequence[Sample]
    clean: Sequence[Sample]
    steps: int
    open_stream: OpenStream
    reweighter: BuildReweighter
    sum_over_ranks: SumOverRanks
    device: torch.device

    @property
    def warm_until(self) -> int:
        """The step that the warm-up ends before."""
        return round(self.steps * self.config.method.warm_up)

    @property
    def clean_from(self) -> int:
        """The step that the clean phase starts with."""
        return round(self.steps * (1 - self.config.method.clean_phase))

    def noisy_stream(self, size: int | None = None) -> Stream:
        return self.open_stream("noisy", self.noisy, "noisy", size or self.config.train.batch_size)

    def clean_stream(self, size: int) -> Stream:
        return self.open_stream("clean", self.clean, "true", size)


def batches_of(stream: Stream, step: int, accumulation: int) -> list[Batch]:
    """This rank's micro-batches of a step."""
    return [stream.batch(step, micro) for micro in range(accumulation)]


def evenly_weighted(batches: Sequence[Batch], sum_over_ranks: SumOverRanks) -> list[WeightedBatch]:
    """The micro-batches of a step with the same weight on every valid pixel."""
    weights = uniform_weights([b.masks for b in batches], ByFunction(sum_over_ranks), batches[0].images.dtype)
    return [WeightedBatch(b, w) for b, w in zip(batches, weights, strict=True)]


def mixed(noisy: WeightedBatch, clean: WeightedBatch, clean_share: float) -> WeightedBatch:
    """Both as one micro-batch, the noisy images first; the clean ones have `clean_share` of the weight."""
    maps = [noisy.weights.times(1 - clean_share), clean.weights.times(clean_share)]
    weights = joined(maps, [noisy.batch.masks, clean.batch.masks])
    return WeightedBatch(joined_batches([noisy.batch, clean.batch]), weights)


def joined_batches(batches: Sequence[Batch]) -> Batch:
    """Several micro-batches as one."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        images=torch.cat([b.images for b in batches]),
        masks=torch.cat([b.masks for b in batches]),
        true_masks=torch.cat([b.true_masks for b in batches]),
        ids=tuple(i for b in batches for i in b.ids),
    )
