"""Making true masks wrong, on purpose and repeatably, to know how well a method copes.

Every noisy mask is a pure function of (true mask, kind, parameters, seed, sample id): no order, rank or machine enters.
"""

import csv
import io
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from distseg.config import NoiseConfig
from distseg.data.decode import read_mask
from distseg.data.manifest import Sample
from distseg.data.seeding import generator
from distseg.errors import UserError


def polygon(mask: NDArray[np.uint8], vertices: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The lesion as an annotator in a hurry draws it: `vertices` clicks on the true contour, joined and filled.

    The clicks are contour pixels at equal arc length from a random start (Mirikharaji et al. 2019). Where
    the mask has several components the one of largest area is drawn and the others are missed; holes are not seen.

    Args:
        mask: (H, W) uint8 in {0, 1}.
        rng: supplies one number, the start.

    Returns:
        (H, W) uint8 in {0, 1}, empty where `mask` is.
    """
    drawn = np.zeros_like(mask)
    contour = _outline(mask)
    if len(contour):
        steps = np.linalg.norm(np.roll(contour, -1, axis=0) - contour, axis=1)
        travelled = np.concatenate([[0.0], np.cumsum(steps)[:-1]])
        clicks = (rng.random() + np.arange(vertices) / vertices) % 1.0 * steps.sum()
        corners = contour[np.searchsorted(travelled, clicks, side="right") - 1]
        cv2.fillPoly(drawn, [corners], 1)
    return drawn


def box(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8: the axis-aligned bounding box of all that is set in `mask` (H, W) uint8; empty where `mask` is."""
    drawn = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    return drawn


def corrupt(mask: NDArray[np.uint8], config: NoiseConfig, sample_id: str) -> NDArray[np.uint8]:
    """The noisy mask of one sample: (H, W) uint8 in {0, 1} from (H, W) uint8 in {0, 1}."""
    if config.kind == "polygon":
        return polygon(mask, config.vertices, generator(config.seed, "noise", sample_id))
    if config.kind == "box":
        return box(mask)
    return mask


def write_noisy_masks(samples: list[Sample], config: NoiseConfig, folder: Path) -> tuple[list[Sample], float]:
    """Give each sample a noisy mask, as PNG (0/255) in `folder`, and say how wrong they are.

    Each file is written aside and renamed, manifest.csv (id, mask, kind, parameters, seed, wrong_pixel_rate) last; a
    rerun writes the same bytes. With kind `none` nothing is written: samples keep the noisy mask that they bring, or
    none.

    Returns:
        The samples with `noisy_mask` set, in the order given, and the mean over them of the fraction of wrong pixels;
        a sample without a noisy mask of its own counts as 0.
    """
    if config.kind == "none":
        return samples, _mean(_own_rate(sample) for sample in samples)
    folder.mkdir(parents=True, exist_ok=True)

    def write(sample: Sample) -> tuple[Sample, float]:
        true = read_mask(sample.mask)
        noisy = corrupt(true, config, sample.id)
        path = folder / f"{sample.id}.png"
        _write_aside(path, cv2.imencode(".png", noisy * 255)[1].tobytes())
        return replace(sample, noisy_mask=path), _wrong_pixel_rate(noisy, true)

    with ThreadPoolExecutor() as pool:
        written = list(pool.map(write, samples))
    parameters = f"vertices={config.vertices}" if config.kind == "polygon" else ""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", "mask", "kind", "parameters", "seed", "wrong_pixel_rate"])
    for sample, rate in written:
        rows.writerow([sample.id, sample.noisy_mask.name, config.kind, parameters, config.seed, f"{rate:.6f}"])
    _write_aside(folder / "manifest.csv", table.getvalue().encode())
    return [sample for sample, _ in written], _mean(rate for _, rate in written)


def _outline(mask: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(N, 2) x, y of the outer contour pixels of the largest component, in order; N = 0 for an empty mask."""
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count == 1:
        return np.empty((0, 2), np.int32)
    largest = 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA]))
    component = (labels == largest).astype(np.uint8)
    contours, _ = cv2.findContours(component, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return contours[0].reshape(-1, 2)


def _own_rate(sample: Sample) -> float:
    if sample.noisy_mask is None:
        return 0.0
    noisy, true = read_mask(sample.noisy_mask), read_mask(sample.mask)
    if noisy.shape != true.shape:
        raise UserError(f"{sample.noisy_mask}: not of the size of {sample.mask}; resample it, nearest neighbour")
    return _wrong_pixel_rate(noisy, true)


def _wrong_pixel_rate(noisy: NDArray[np.uint8], true: NDArray[np.uint8]) -> float:
    return float(np.mean(noisy != true))


def _mean(rates: Iterable[float]) -> float:
    values = list(rates)
    return float(np.mean(values)) if values else 0.0


def _write_aside(path: Path, content: bytes) -> None:
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(aside).chmod(0o644)  # mkstemp's 0600 would hide the masks from those they are shared with
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
