"""The label model of an audit, from the logits that are on the disk: one calibration a network, one habit an annotator.

Everything here is a function of files and settings, so that an audit that was stopped gives the same when it goes on.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distseg.data.decode import Decoding, read_mask
from distseg.data.resize import resize_mask
from distseg.data.sample import Sample
from distseg.data.seeding import generator
from distseg.errors import BadFileError
from distseg.inference.audit.drawn import Drawn
from distseg.labels.annotators import identity_prior
from distseg.labels.calibration import calibrated
from distseg.labels.distances import signed_distance_bins
from distseg.labels.fitting import WEIGHT, Marked, fit_calibration, fit_counts

logger = logging.getLogger(__name__)

OWN_COUNTS = 10
"""Masks from which on an annotator has counts of their own; those with fewer share theirs."""
_SHARED = "\0shared"
_PIXELS = 2**22
"""From which habits are counted, and a network is calibrated, over all images about; and the fewest of an image."""
_LEAST_PIXELS = 64


@dataclass(frozen=True)
class Judge:
    """A network, and the images that it judges."""

    name: str
    drawn: Sequence[Drawn]
    images: Path
    """Folder with ID.npy, relative logits (C, rows, columns) float16 of each image's picture."""
    predictions: Path
    """Folder with ID.png, its masks at the images' own size."""
    calibration: Path
    """Folder with ID.npy of the images that it is calibrated on."""
    references: Sequence[Sample]
    """Those images."""


@dataclass(frozen=True)
class LabelModel:
    thetas: Mapping[str, Tensor]
    """The calibration of each judge, by name."""
    counts: Mapping[str, Tensor]
    habits: Mapping[str, str]
    """Under which name `counts` has an annotator."""
    weight: float
    """Of the annotators' evidence (labels/fitting.py)."""

    def posterior(self, judge: str, relative: Tensor, masks: Mapping[str, NDArray[np.uint8]]) -> Tensor:
        """(C, H, W) logits of what each pixel truly is, given image and masks (H, W); relative logits (C, H, W)."""
        _, height, width = relative.shape
        logits = calibrated(relative[None], self.thetas[judge])[0]
        names = tuple(self.habits[annotator] for annotator in masks)
        return _marked(names, logits, [*masks.values()]).posterior(self.counts, self.weight).view(-1, height, width)


def logits_of(folder: Path, id: str) -> Tensor:
    """(C, rows, columns) float32. Raises OSError or ValueError."""
    return torch.from_numpy(np.load(folder / f"{id}.npy", allow_pickle=False)).float()


def masks_at(drawn: Drawn, size: tuple[int, int], decoding: Decoding) -> dict[str, NDArray[np.uint8]]:
    """Each annotator's mask at (height, width). Raises BadFileError."""
    return {name: resize_mask(read_mask(path, decoding), *size) for name, path in drawn.masks.items()}


def fit(judges: Sequence[Judge], decoding: Decoding, classes: int, weight: float = WEIGHT) -> LabelModel:
    """Of all images whose files can be read; the others are named when they are judged (verdicts.py)."""
    thetas = {judge.name: fit_calibration(_references(judge, decoding), classes) for judge in judges}
    drawn = [each for judge in judges for each in judge.drawn]
    occurrences = Counter(annotator for each in drawn for annotator in each.masks)
    habits = {name: name if count >= OWN_COUNTS else _SHARED for name, count in sorted(occurrences.items())}
    by_annotators: dict[tuple[str, ...], list[Marked]] = {}
    for judge in judges:
        for each in judge.drawn:
            try:
                relative = logits_of(judge.images, each.sample.id)
                masks = masks_at(each, (relative.shape[1], relative.shape[2]), decoding)
            except (BadFileError, OSError, ValueError):
                continue
            names = tuple(habits[annotator] for annotator in masks)
            part = _marked(names, calibrated(relative[None], thetas[judge.name])[0], [*masks.values()])
            chosen = _chosen(each.sample.id, part.logits.shape[1], len(drawn))
            part = Marked(part.annotators, part.logits[:, chosen], part.bins[:, chosen])
            by_annotators.setdefault(names, []).append(part)
    blocks = [_joined(parts) for _, parts in sorted(by_annotators.items())]
    counts = fit_counts(blocks, classes, weight)
    unread = {name: identity_prior(classes, torch.device("cpu")) for name in habits.values()}
    return LabelModel(thetas, unread | counts, habits, weight)


def _references(judge: Judge, decoding: Decoding) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for sample in judge.references:
        try:
            relative = logits_of(judge.calibration, sample.id)
            mask = resize_mask(read_mask(sample.truth, decoding), relative.shape[1], relative.shape[2])
        except (BadFileError, OSError, ValueError) as error:
            logger.warning("not calibrated on %s: %s", sample.id, error)
            continue
        chosen = _chosen(sample.id, mask.size, len(judge.references))
        pairs.append((relative.flatten(1)[None, :, None, chosen], torch.from_numpy(mask.ravel()[chosen])[None, None]))
    return pairs


def _marked(names: tuple[str, ...], logits: Tensor, masks: Sequence[NDArray[np.uint8]]) -> Marked:
    """All pixels of an image: logits (C, H, W), masks (H, W)."""
    bins = signed_distance_bins(torch.from_numpy(np.stack(masks)), len(logits))
    return Marked(names, logits.flatten(1), bins.flatten(1))


def _chosen(id: str, pixels: int, images: int) -> NDArray[np.int64]:
    """Which of an image's pixels take part, drawn by its id, so that those of all `images` fit into memory."""
    count = max(_LEAST_PIXELS, _PIXELS // images)
    if pixels <= count:
        return np.arange(pixels)
    return np.sort(generator("audit", id).choice(pixels, count, replace=False))


def _joined(parts: Sequence[Marked]) -> Marked:
    return Marked(
        parts[0].annotators,
        torch.cat([part.logits for part in parts], 1),
        torch.cat([part.bins for part in parts], 1),
    )
