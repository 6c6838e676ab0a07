"""Predictions against references, image by image, at the images' own size."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from distseg.data.classes import IGNORE
from distseg.data.decode import Decoding, read_mask
from distseg.data.inspect import inspect_mask
from distseg.data.sample import Problem, Sample
from distseg.errors import BadFileError
from distseg.evaluation.calibration import BINS, calibration_bins
from distseg.evaluation.metrics import image_scores
from distseg.evaluation.surfaces import surface_scores

SURFACES = ("hausdorff95", "hausdorff95_share", "surface_dice")
"""Pixels of the file; share of the image's diagonal; share of the outlines within the tolerance."""


@dataclass(frozen=True)
class Scored:
    """One image."""

    sample: Sample
    size: tuple[int, int]
    """(height, width)."""
    counts: NDArray[np.int64]
    """(classes, 4): true and false positives, false and true negatives of each class against the others."""
    surfaces: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """By name of SURFACES, (classes,); NaN of background. Empty where they were not asked for."""
    calibration: NDArray[np.float64] | None = None
    """(BINS, 3) as from `calibration_bins`; None without probabilities."""

    @property
    def counted(self) -> NDArray[np.int64]:
        """What training counts: (4,) of two classes, (classes − 1, 4) of more."""
        return self.counts[1] if len(self.counts) == 2 else self.counts[1:]


def score_masks(
    samples: Sequence[Sample],
    folder: Path,
    decoding: Decoding,
    tolerance: float | None,
    threads: int,
) -> Iterator[Scored | Problem]:
    """Each sample's mask in `folder`, ID.png or masks/ID.png, against its reference, in the order given.

    Probabilities beside them, as `predict` writes them, give the calibration. `tolerance` of the surface Dice is a
    share of the image's diagonal; None leaves distances out. Ignored pixels count nowhere.
    """
    masks = folder / "masks" if (folder / "masks").is_dir() else folder
    work = partial(_scored, masks=masks, decoding=decoding, tolerance=tolerance)
    with ThreadPoolExecutor(threads) as pool:
        # A few at a time: what is read waits for nobody, but pixels are not kept.
        for first in range(0, len(samples), 4 * threads):
            yield from pool.map(work, samples[first : first + 4 * threads])


def class_scores(scored: Sequence[Scored], place: int) -> dict[str, NDArray[np.float64]]:
    """Every score (n,) of one class."""
    scores = image_scores(np.stack([each.counts[place] for each in scored]))
    for name in SURFACES:
        if all(each.surfaces for each in scored):
            scores[name] = np.array([each.surfaces[name][place] for each in scored])
    return scores


def _scored(sample: Sample, masks: Path, decoding: Decoding, tolerance: float | None) -> Scored | Problem:
    path = masks / f"{sample.id}.png"
    try:
        for each in (sample.truth, path):
            inspect_mask(each, decoding)  # reading takes for lesion whatever is not black
        truth = read_mask(sample.truth, decoding)
        mask = read_mask(path, decoding)
    except BadFileError as error:
        return Problem(sample.id, *_parted(str(error)))
    if mask.shape != truth.shape:
        sizes = " and ".join(f"{width}×{height}" for height, width in (mask.shape, truth.shape))
        return Problem(sample.id, str(path), f"mask and reference have different sizes, {sizes}")
    valid = truth != IGNORE
    count = len(decoding.classes.names)
    counts = np.stack([_confusion(mask == place, truth == place, valid) for place in range(count)])
    surfaces = {} if tolerance is None else _surfaces(mask, truth, valid, count, tolerance)
    calibration = _calibration(masks.parent / "probabilities", sample.id, mask, truth, valid)
    if isinstance(calibration, Problem):
        return calibration
    return Scored(sample, (truth.shape[0], truth.shape[1]), counts, surfaces, calibration)


def _parted(error: str) -> tuple[str, str]:
    """A BadFileError's file and reason."""
    file, _, reason = error.partition(": ")
    return file, reason


def _confusion(prediction: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    cells = (prediction & truth, prediction & ~truth, ~prediction & truth, ~prediction & ~truth)
    return np.array([(cell & valid).sum() for cell in cells], np.int64)


def _surfaces(
    mask: NDArray[np.uint8], truth: NDArray[np.uint8], valid: NDArray[np.bool_], count: int, tolerance: float
) -> dict[str, NDArray[np.float64]]:
    values = {name: np.full(count, np.nan) for name in SURFACES}
    diagonal = float(np.hypot(*truth.shape))
    for place in range(1, count):
        found = surface_scores((mask == place) & valid, (truth == place) & valid, tolerance * diagonal)
        for name, value in zip(SURFACES, (found.hausdorff95, found.hausdorff95 / diagonal, found.surface_dice),
                               strict=True):  # fmt: skip
            values[name][place] = value
    return values


def _calibration(
    folder: Path, id: str, mask: NDArray[np.uint8], truth: NDArray[np.uint8], valid: NDArray[np.bool_]
) -> NDArray[np.float64] | Problem | None:
    """Over the classes' own probabilities, or, of two classes, that of lesion in 16 bits."""
    path = next((each for each in (folder / f"{id}.png", folder / f"{id}.npz") if each.is_file()), None)
    if path is None:
        return None
    try:
        confidence = _confidence(path)
    except (OSError, ValueError, KeyError, EOFError) as error:
        return Problem(id, str(path), f"cannot be read: {' '.join(str(error).split())}; predict it again")
    if confidence.shape != mask.shape:
        return Problem(id, str(path), "is not of its mask's size; predict it again")
    right = mask == truth
    total = np.zeros((BINS, 3))
    for first in range(0, len(mask), 256):
        rows = slice(first, first + 256)
        total += calibration_bins(confidence[rows][valid[rows]], right[rows][valid[rows]])
    return total


def _confidence(path: Path) -> NDArray[Any]:
    """(H, W): the probability of the most probable class."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as content:
            return np.asarray(content["probabilities"].max(axis=0), np.float32)
    stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 2:
        raise ValueError("it is no PNG of 16 bits")
    values = stored.astype(np.float32) / np.float32(65535)
    return np.maximum(values, 1 - values)
