"""From samples to batches: which samples, in which order, under which augmentation; decoding is a loader's work."""

from dataclasses import dataclass

from torch import Tensor


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
