"""Scores of a network on a split, spread over the ranks."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distseg.data.config import DataConfig
from distseg.data.sample import Sample
from distseg.data.streams import evaluation_batches
from distseg.distributed.collectives import sum_over_ranks
from distseg.distributed.runtime import Runtime
from distseg.evaluation.evaluator import evaluate


def score(
    model: nn.Module,
    samples: Sequence[Sample],
    config: DataConfig,
    runtime: Runtime,
    batch_size: int,
    sharded: bool,
) -> np.ndarray:
    """True and false positives, false and true negatives of each sample, the same on every rank.

    (n, 4) of two classes, (n, C − 1, 4) of more.

    sharded: whether a forward pass gathers parameters. The ranks with fewer batches then take part in the others'.
    """
    model.eval()
    shard = runtime.shard
    batches = evaluation_batches(samples, config, shard, batch_size, runtime.device)
    rows = shard.evaluation_batches(len(samples), batch_size)
    most = math.ceil(math.ceil(len(samples) / shard.world_size) / batch_size)

    @torch.no_grad()
    def total(counts: Tensor) -> Tensor:  # a rank with no sample counts on the CPU
        if sharded:
            side = config.image_size
            for _ in range(most - len(rows)):
                model(torch.zeros(1, 3, side, side, device=runtime.device))
        return sum_over_ranks(counts.to(runtime.device))

    counts = evaluate(model, batches, rows, len(samples), total, config.class_count)
    model.train()
    return counts
