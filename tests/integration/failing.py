"""A real network for `model.name`, whose logits are NaN from a chosen forward pass of the engine's on one rank."""

import itertools
import os

import torch
from torch import Tensor, nn


class Failing(nn.Module):
    def __init__(self, rank: int, at: list[int]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 3, padding=1)
        # Has buffers, and normalises no rank by the numbers of another.
        self.norm = nn.InstanceNorm2d(1, affine=True, track_running_stats=True)
        self.fails, self.at = rank == int(os.environ["RANK"]), at
        # A count that no buffer holds, which a skipped step would take back.
        self.calls = itertools.count(1)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and next(self.calls) in self.at and self.fails:
            images = images * torch.nan
        return self.norm(self.layer(images))
