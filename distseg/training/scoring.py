"""Scores of a network on a split, spread over the ranks."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distseg.data.config import DataConfig
from distseg.data.decode import read_size
from distseg.data.sample import Sample
from distseg.data.streams import evaluation_batches
from distseg.distributed.collectives import sum_over_ranks
from distseg.distributed.runtime import Runtime
from distseg.evaluation.evaluator import evaluate
from distseg.evaluation.own_resolution import OwnResolution
from distseg.evaluation.tiles import count_tiles, predict_by_tiles


class Counts(NamedTuple):
    """True and false positives, false and true negatives of each sample, int64, the same on every rank.

    (n, 4) of two classes, (n, C − 1, 4) of more.
    """

    network: np.ndarray
    """At the network's resolution; of shape crop, at the file's times data.scale."""
    own: np.ndarray | None
    """At the file's own resolution, where it was asked for."""


def score(
    model: nn.Module,
    samples: Sequence[Sample],
    config: DataConfig,
    runtime: Runtime,
    batch_size: int,
    sharded: bool,
    own: bool,
) -> Counts:
    """Score each of `samples` once; `batch_size` images or tiles at a time. `own`: at the files' resolution too.

    sharded: whether a forward pass gathers parameters. The ranks with fewer passes then take part in the others'.
    """
    model.eval()
    shard, side, class_count = runtime.shard, config.image_size, config.class_count
    by_tiles = config.shape == "crop"
    at_once = 1 if by_tiles else batch_size
    batches = evaluation_batches(samples, config, shard, at_once, runtime.device)
    rows = shard.evaluation_batches(len(samples), at_once)
    missing = _missing_passes(samples, rows, config, runtime, batch_size) if sharded else 0
    predict: Callable[[Tensor], Tensor] = model
    if by_tiles:
        predict = partial(_tiled, model, side, config.overlap, batch_size)

    @torch.no_grad()
    def total(counts: Tensor) -> Tensor:  # a rank with no sample counts on the CPU
        for _ in range(missing):
            model(torch.zeros(1, 3, side, side, device=runtime.device))
        return sum_over_ranks(counts.to(runtime.device))

    if not own:
        counts = Counts(evaluate(predict, batches, rows, len(samples), total, class_count), None)
    else:
        with closing(
            OwnResolution(predict, samples, rows, config.frame, config.decoding, config.threads, class_count)
        ) as both:
            network = evaluate(both, batches, rows, len(samples), total, class_count)
        counts = Counts(network, sum_over_ranks(both.counts.to(runtime.device)).cpu().numpy())
    model.train()
    return counts


def _tiled(model: nn.Module, size: int, overlap: float, batch_size: int, images: Tensor) -> Tensor:
    return predict_by_tiles(model, images, size, overlap, batch_size)


def _missing_passes(
    samples: Sequence[Sample], rows: Sequence[range], config: DataConfig, runtime: Runtime, batch_size: int
) -> int:
    """By how many forward passes this rank falls short of the rank with most; every rank calls it."""
    shard = runtime.shard
    if config.shape != "crop":
        return math.ceil(math.ceil(len(samples) / shard.world_size) / batch_size) - len(rows)
    passes = torch.zeros(shard.world_size, dtype=torch.int64, device=runtime.device)
    for position in (position for positions in rows for position in positions):
        canvas = config.frame.place(*read_size(samples[position].image, config.decoding)).canvas
        passes[shard.rank] += math.ceil(count_tiles(*canvas, config.image_size, config.overlap) / batch_size)
    passes = sum_over_ranks(passes)
    return int(passes.max() - passes[shard.rank])
