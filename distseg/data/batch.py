"""What a loader is asked for, and what it yields."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from distseg.data.annotators import Annotators, drawn_masks
from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS, Transform
from distseg.data.sample import Sample

Labels = Literal["noisy", "true"]


class EveryAnnotation(NamedTuple):
    """What all annotators have drawn of the images of a batch."""

    masks: Tensor
    """(B, R, H, W): `Batch.annotations`."""
    annotators: Tensor
    """(B, R): `Batch.annotators`."""


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
    annotations: Tensor | None = None
    """(B, R, H, W) uint8 class ids, 255 = ignore: what each annotator has drawn; `masks` is their vote in the noisy
    stream. Of data.annotators=all, else None. R is the most of any training image; what an image lacks is 255."""
    annotators: Tensor | None = None
    """(B, R) int64: who has drawn them, by place in `Annotators.names`; −1 for what an image lacks."""

    @property
    def every(self) -> "EveryAnnotation | None":
        """`annotations` and `annotators`, where there are any."""
        if self.annotations is None or self.annotators is None:
            return None
        return EveryAnnotation(self.annotations, self.annotators)

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
    annotations: tuple[Path, ...] | None = None
    """All of the sample's, where they are wanted; of all requests of a loader or of none."""
    annotators: tuple[int, ...] = ()
    """Who has drawn them, then −1 for as many as `Batch.annotations` has room for."""

    @property
    def masks(self) -> list[Path]:
        """Each file of a mask once: the label, the true mask, the annotations."""
        truth = () if self.truth is None else (self.truth,)
        return list(dict.fromkeys((self.label, *truth, *(self.annotations or ()))))

    @classmethod
    def of(
        cls,
        sample: Sample,
        labels: Labels,
        transform: Transform,
        annotation: int = 0,
        truth_known: bool = True,
        window: tuple[float, float] | None = None,
        annotators: Annotators | None = None,
    ) -> Self:
        """Of the reference (`true`), or of one of the annotations (`noisy`), where a study has made the sample some.

        annotators: those of the training; then all annotations come beside the label.
        """
        drawn = drawn_masks(sample) if labels == "noisy" else sample.annotations
        label = drawn[annotation].mask if labels == "noisy" else sample.truth
        request = cls(sample.id, sample.image, label, sample.reference if truth_known else None, transform, window)
        if annotators is None:
            return request
        return replace(request, annotations=tuple(each.mask for each in drawn), annotators=annotators.places(drawn))
