"""What a loader is asked for, and what it yields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS, Transform
from distseg.data.sample import Sample

Labels = Literal["noisy", "true"]


@dataclass(frozen=True)
class Batch:
    """What every loader yields. B samples on the training device; H×W is image_size², or a whole canvas to be tiled."""

    images: Tensor
    """(B, 3, H, W) float32, contiguous; RGB, normalised by channel means and deviations."""
    masks: Tensor
    """(B, H, W) uint8 class ids to learn from, 255 = ignore: noisy masks in the noisy stream."""
    true_masks: Tensor | None
    """(B, H, W) uint8: the references; the same tensor as `masks` where those are learned from, and None unless every
    image of the stream has one."""
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
    """What a loader is asked for: one image, its masks, and what to do with the pixels."""

    id: str
    image: Path
    label: Path
    """The mask to learn from."""
    truth: Path | None
    """The reference, which may be the same file; of all requests of a loader or of none."""
    transform: Transform
    window: tuple[float, float] | None = None
    """The part of a larger canvas that is wanted, as `geometry.cut` takes it; None: all of it."""

    @classmethod
    def of(
        cls,
        sample: Sample,
        labels: Labels,
        transform: Transform,
        annotation: int = 0,
        truth_known: bool = True,
        window: tuple[float, float] | None = None,
    ) -> Self:
        """Of the reference (`true`), or of one of the annotations (`noisy`), where a study has made the sample some."""
        noisy = labels == "noisy" and sample.annotations
        label = sample.annotations[annotation].mask if noisy else sample.truth
        return cls(sample.id, sample.image, label, sample.reference if truth_known else None, transform, window)
