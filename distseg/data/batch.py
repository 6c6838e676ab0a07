"""What a loader is asked for, and what it yields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS, Transform
from distseg.data.sample import Sample

Labels = Literal["noisy", "true"]


@dataclass(frozen=True)
class Batch:
    """What every loader yields. B samples at network resolution H×W, on the training device."""

    images: Tensor
    """(B, 3, H, W) float32, contiguous; RGB, normalised by channel means and deviations."""
    masks: Tensor
    """(B, H, W) uint8 class ids to learn from, 255 = ignore: noisy masks in the noisy stream."""
    true_masks: Tensor
    """(B, H, W) uint8: the clean annotation; the same tensor as `masks` where nothing was corrupted."""
    ids: tuple[str, ...]

    @property
    def pictures(self) -> Tensor:
        """(B, 3, H, W) float32: the images in [0, 1] again, to be looked at."""
        means, deviations = (
            torch.as_tensor(values, dtype=torch.float32, device=self.images.device)[:, None, None]
            for values in (CHANNEL_MEANS, CHANNEL_DEVIATIONS)
        )
        return (self.images * deviations + means).clamp(0, 1)


@dataclass(frozen=True)
class Request:
    """What a loader is asked for: one sample, which of its masks to learn from, and what to do with the pixels."""

    sample: Sample
    labels: Labels
    transform: Transform

    @property
    def label_file(self) -> Path:
        """The mask to learn from; the true mask's own path where the sample has no noisy one."""
        return (self.sample.noisy_mask if self.labels == "noisy" else None) or self.sample.mask
