"""Several annotators of an image: who they are, and one mask of theirs."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distseg.data.classes import IGNORE
from distseg.data.decode import Decoding, read_mask
from distseg.data.sample import Annotation, Sample
from distseg.errors import UserError
from distseg.files import write_atomically

Rule = Literal["majority", "staple"]


def drawn_masks(sample: Sample) -> tuple[Annotation, ...]:
    """What a noisy image is learned from: its annotations, or its reference where a study leaves that as it is."""
    return sample.annotations or (Annotation("", sample.truth),)


@dataclass(frozen=True)
class Annotators:
    """Who has drawn masks of the training images, and how many of one image at most."""

    names: tuple[str, ...]
    """Sorted; an empty one for those without a name."""
    most: int

    @classmethod
    def of(cls, noisy: Sequence[Sample], clean: Sequence[Sample]) -> Self:
        """Of both streams, so that all batches are alike."""
        drawn = [*map(drawn_masks, noisy), *(sample.annotations for sample in clean)]
        names = {each.annotator for annotations in drawn for each in annotations}
        return cls(tuple(sorted(names)), max(map(len, drawn), default=0))

    def check_several(self) -> None:
        """Raises UserError where nobody's mask has another's beside it."""
        if self.most < 2:
            raise UserError(
                "data.annotators all: no training image has two annotations, and all of one are the drawn one; set "
                "data.annotators=drawn"
            )

    def places(self, drawn: Sequence[Annotation]) -> tuple[int, ...]:
        """(most,) the place of each one's name, then −1."""
        known = tuple(self.names.index(each.annotator) for each in drawn)
        return known + (-1,) * (self.most - len(known))


def fuse_annotations(
    samples: Sequence[Sample], rule: Rule, folder: Path, decoding: Decoding, write: bool
) -> list[Sample]:
    """Each sample with one annotation in place of several, as PNG in `folder` with the values that the data's own
    masks have, in the order given.

    Without `write` the files are those that another rank has written. Raises UserError where a library is missing.
    """
    several = [sample for sample in samples if len(sample.annotations) > 1]
    fused = {sample.id: folder / f"{sample.id}.png" for sample in several}

    def fuse_one(sample: Sample) -> None:
        masks = np.stack([read_mask(each.mask, decoding) for each in sample.annotations])
        mask = majority(masks) if rule == "majority" else staple(masks)
        write_atomically(fused[sample.id], decoding.classes.encode(mask), durable=False)  # can be made again

    missing = [sample for sample in several if write or not fused[sample.id].exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(fuse_one, missing))
    return [
        replace(sample, annotations=(Annotation(rule, fused[sample.id]),)) if sample.id in fused else sample
        for sample in samples
    ]


def majority(masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(R, H, W) uint8 class ids of R annotators, 255 = ignore, to (H, W): the class that most of them mark.

    A tie goes to the lowest id, background first. A pixel is ignored only where every annotator ignores it.
    """
    ids = [id for id in np.unique(masks).tolist() if id != IGNORE]
    if not ids:
        return np.full(masks.shape[1:], IGNORE, np.uint8)
    votes = np.stack([(masks == id).sum(axis=0) for id in ids])
    winner = np.array(ids, np.uint8)[votes.argmax(axis=0)]
    return np.where((masks == IGNORE).all(axis=0), np.uint8(IGNORE), winner)


def vote(annotations: Tensor, classes: int) -> Tensor:
    """`majority` of (B, R, H, W) uint8 to (B, H, W), on their device."""
    votes = torch.stack([(annotations == index).sum(1) for index in range(classes)])
    return torch.where(votes.sum(0) > 0, votes.argmax(0), IGNORE).to(torch.uint8)


def staple(masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`majority`'s arguments and result, by STAPLE of several labels (Warfield et al. 2004; Rohlfing et al. 2003).

    Where the estimate leaves a pixel undecided it is the majority's. Raises UserError without SimpleITK.
    """
    try:
        import SimpleITK  # heavy and optional
    except ImportError as error:
        raise UserError(
            f"data.annotators staple: SimpleITK does not import ({error}); pip install SimpleITK, or set "
            "data.annotators=majority"
        ) from None
    undecided = int(masks.max()) + 1 if masks.max() < IGNORE - 1 else IGNORE - 1
    images = [SimpleITK.GetImageFromArray(mask) for mask in masks]
    estimate = SimpleITK.GetArrayFromImage(SimpleITK.MultiLabelSTAPLE(images, undecided))
    return np.where(estimate == undecided, majority(masks), estimate).astype(np.uint8)
